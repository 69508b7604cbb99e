//! Packets with descriptors over a Unix socket.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Descriptors in one packet that are looked at; the kernel closes further ones.
const DESCRIPTORS: usize = 4;

/// A packet as it came.
pub(super) struct Packet {
    /// Its bytes; 0 at the end of the connection.
    pub(super) length: usize,
    /// Its descriptors, close-on-exec.
    pub(super) descriptors: Vec<OwnedFd>,
    /// Whether bytes or descriptors of it were cut off.
    pub(super) is_cut: bool,
}

/// Sends one packet, with a descriptor or without; never part of one.
///
/// # Errors
/// Those of sendmsg(2): `WouldBlock` where the other end does not read.
pub(super) fn send(
    socket: impl AsFd,
    bytes: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<BorrowedFd<'_>> = descriptor.into_iter().collect();
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let sent = again(|| sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, flags))?;
    debug_assert_eq!(sent, bytes.len());
    Ok(())
}

/// Receives one packet and its descriptors. What is cut off is closed: its
/// descriptors are none.
///
/// # Errors
/// Those of recvmsg(2).
pub(super) fn receive(socket: impl AsFd, bytes: &mut [u8], flags: RecvFlags) -> io::Result<Packet> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let got = again(|| {
        let mut parts = [IoSliceMut::new(bytes)];
        recvmsg(&socket, &mut parts, &mut control, flags)
    })?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    let is_cut = got
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    if is_cut {
        descriptors.clear();
    }
    Ok(Packet {
        length: got.bytes,
        descriptors,
        is_cut,
    })
}

/// Receives or looks at one packet's bytes. Its descriptors do not get into
/// this process: the kernel lets go of them, without asking their file systems,
/// which a close(2) of ours would wait for. The packet's own length, which may
/// be more than was received.
///
/// # Errors
/// Those of recv(2).
pub(super) fn receive_bytes(
    socket: impl AsFd,
    bytes: &mut [u8],
    flags: RecvFlags,
) -> io::Result<usize> {
    let (_, length) = again(|| rustix::net::recv(&socket, &mut *bytes, flags | RecvFlags::TRUNC))?;
    Ok(length)
}

/// Again, when a signal interrupts it.
fn again<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            result => return result.map_err(Into::into),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use std::fs::File;
    use std::os::fd::AsRawFd;

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::CLOEXEC;
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
    }

    fn send_all(socket: &OwnedFd, files: &[File]) {
        let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
        let bytes = [IoSlice::new(b"x")];
        sendmsg(socket, &bytes, &mut control, SendFlags::empty()).unwrap();
    }

    #[test]
    fn descriptors_come_close_on_exec_or_not_at_all() {
        let (one, other) = pair();
        let null = || File::open("/dev/null").unwrap();
        send(&one, b"abc", Some(null().as_fd())).unwrap();
        let mut bytes = [0; 8];
        let packet = receive(&other, &mut bytes, RecvFlags::empty()).unwrap();
        assert_eq!((packet.length, packet.is_cut), (3, false));
        let flags = rustix::io::fcntl_getfd(&packet.descriptors[0]).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        assert!(packet.descriptors[0].as_raw_fd() > 2);
        // More than there is room for.
        let many: Vec<File> = (0..60).map(|_| null()).collect();
        send_all(&one, &many);
        let packet = receive(&other, &mut bytes, RecvFlags::empty()).unwrap();
        assert!(packet.is_cut && packet.descriptors.is_empty());
        // By the bytes alone none comes.
        let before = std::fs::read_dir("/proc/self/fd").unwrap().count();
        for peek in [RecvFlags::PEEK, RecvFlags::empty()] {
            if peek == RecvFlags::PEEK {
                send_all(&one, &many[..1]);
            }
            assert_eq!(receive_bytes(&other, &mut bytes, peek).unwrap(), 1);
        }
        let after = std::fs::read_dir("/proc/self/fd").unwrap().count();
        // Other tests' threads open some, too.
        assert!(after < before + 20);
        // A packet that is too long says so.
        send(&one, b"123456789", None).unwrap();
        assert!(
            receive(&other, &mut bytes, RecvFlags::empty())
                .unwrap()
                .is_cut
        );
        drop(one);
        let end = receive(&other, &mut bytes, RecvFlags::empty()).unwrap();
        assert_eq!(end.length, 0);
    }
}
