//! Descriptors in messages: SCM_RIGHTS of unix(7).

use std::ptr::from_mut;

use nix::libc;

use crate::calls::{self, close, plain, with};
use crate::worker::Loop;

/// Descriptors in one message, at most.
const PASSED: usize = 4;
/// Words of a control message: its header is two, then two descriptors each.
const WORDS: usize = 2 + PASSED / 2;
/// struct cmsghdr, its length alone.
const HEADER: usize = 16;

/// A message of one byte, and what comes with it.
#[repr(C)]
struct Message {
    byte: [u8; 8],
    part: libc::iovec,
    control: [u64; WORDS],
    header: libc::mmsghdr,
}

impl Message {
    fn new() -> Self {
        Self {
            byte: [0; 8],
            part: libc::iovec {
                iov_base: std::ptr::null_mut(),
                iov_len: 1,
            },
            control: [0; WORDS],
            header: calls::empty_message(),
        }
    }

    /// Points to itself, where it is now; with so many bytes of control.
    fn fixed(&mut self, control: usize) -> &mut libc::mmsghdr {
        self.part.iov_base = from_mut(&mut self.byte).cast();
        self.header.msg_hdr.msg_iov = from_mut(&mut self.part);
        self.header.msg_hdr.msg_iovlen = 1;
        self.header.msg_hdr.msg_control = from_mut(&mut self.control).cast();
        self.header.msg_hdr.msg_controllen = control;
        &mut self.header
    }

    /// Puts descriptors in.
    fn fill(&mut self, fds: &[usize]) -> &mut libc::mmsghdr {
        let length = HEADER + 4 * fds.len();
        self.control[0] = length as u64;
        self.control[1] = libc::SOL_SOCKET as u64 | (libc::SCM_RIGHTS as u64) << 32;
        for (index, fd) in fds.iter().enumerate() {
            self.control[2 + index / 2] |= (*fd as u64 & 0xffff_ffff) << (32 * (index % 2));
        }
        self.fixed(length)
    }
}

fn pair(own: &mut Loop) -> Result<[usize; 2], i64> {
    let mut two = [0i32; 2];
    let kind = libc::SOCK_DGRAM | own.cloexec();
    let args = [libc::AF_UNIX as usize, kind as usize, 0];
    match with(libc::SYS_socketpair, &args, 3, &mut two) {
        0 => Ok(two.map(|fd| fd as usize)),
        error => Err(error),
    }
}

fn close_both(two: [usize; 2]) {
    close(two[0] as i64);
    close(two[1] as i64);
}

/// Sends so many descriptors.
fn send_by(own: &mut Loop, socket: usize, count: usize) -> i64 {
    let mut fds = [0; PASSED];
    for fd in &mut fds[..count] {
        *fd = own.fd();
    }
    let mut message = Message::new();
    let header = message.fill(&fds[..count]);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    with(
        libc::SYS_sendmsg,
        &[socket, 0, flags as usize],
        1,
        &mut header.msg_hdr,
    )
}

fn receive_by(own: &mut Loop, socket: usize, room: usize) -> i64 {
    let mut message = Message::new();
    let header = message.fixed(HEADER + 4 * room);
    let cloexec = if own.random.one_in(2) {
        libc::MSG_CMSG_CLOEXEC
    } else {
        0
    };
    let flags = (libc::MSG_DONTWAIT | cloexec) as usize;
    with(
        libc::SYS_recvmsg,
        &[socket, 0, flags],
        1,
        &mut header.msg_hdr,
    )
}

/// Sends to itself; `short`: there is no room for some of what comes.
pub fn within(own: &mut Loop, short: bool) -> ([i64; 2], i64) {
    let two = match pair(own) {
        Ok(two) => two,
        Err(error) => return ([0, 0], error),
    };
    let count = own
        .random
        .between(if short { 2 } else { 1 }, PASSED as u64 + 1) as usize;
    let room = if short {
        own.random.below(count as u64) as usize
    } else {
        PASSED
    };
    let mut ret = send_by(own, two[0], count);
    if ret >= 0 {
        ret = receive_by(own, two[1], room);
    }
    close_both(two);
    ([count as i64, room as i64], ret)
}

/// Sends two messages to itself, and takes both at once.
pub fn many(own: &mut Loop) -> ([i64; 2], i64) {
    let two = match pair(own) {
        Ok(two) => two,
        Err(error) => return ([0, 0], error),
    };
    let counts = [
        own.random.between(1, 3) as usize,
        own.random.between(1, 5) as usize,
    ];
    let mut ret = 0;
    for count in counts {
        ret = ret.min(send_by(own, two[0], count));
    }
    if ret >= 0 {
        let mut messages = [Message::new(), Message::new(), Message::new()];
        let mut headers = messages.each_mut().map(|m| *m.fixed(HEADER + 4 * PASSED));
        let flags = libc::MSG_DONTWAIT as usize;
        ret = with(
            libc::SYS_recvmmsg,
            &[two[1], 0, 3, flags, 0],
            1,
            &mut headers,
        );
    }
    close_both(two);
    ([counts[0] as i64, counts[1] as i64], ret)
}

/// Leaves a message at a socket: for another thread, or a child to come.
pub fn send(own: &mut Loop) -> ([i64; 2], i64) {
    let two = match pair(own) {
        Ok(two) => two,
        Err(error) => return ([0, 0], error),
    };
    let count = own.random.between(1, PASSED as u64 + 1) as usize;
    let ret = send_by(own, two[0], count);
    // Without its other end the message is still there.
    if own.random.one_in(2) {
        close(two[0] as i64);
    }
    ([two[0] as i64, two[1] as i64], ret)
}

/// Takes a message from whatever socket has one.
pub fn receive(own: &mut Loop) -> ([i64; 2], i64) {
    let mut ret = i64::from(-libc::ENOTSOCK);
    let limit = 64.min(own.limit());
    let start = own.random.below(limit);
    for index in 0..limit {
        let fd = (3 + (start + index) % limit) as usize;
        let mut kind = 0i32;
        let mut size = 4u32;
        let size = from_mut(&mut size).addr();
        let (socket, option) = (libc::SOL_SOCKET as usize, libc::SO_TYPE as usize);
        if with(
            libc::SYS_getsockopt,
            &[fd, socket, option, 0, size],
            3,
            &mut kind,
        ) < 0
        {
            continue;
        }
        ret = receive_by(own, fd, PASSED);
        if ret >= 0 {
            return ([fd as i64, 0], ret);
        }
    }
    // A number that is none.
    plain(
        libc::SYS_recvmsg,
        &[usize::MAX, 0, libc::MSG_DONTWAIT as usize],
    );
    ([-1, 0], ret)
}
