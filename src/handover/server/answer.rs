//! One request, answered.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::net::RecvFlags;

use super::{Connected, Held, Next, Shared};
use crate::handover::protocol::{Answer, MAX_RANGES, REQUEST_BYTES, Request, part};
use crate::handover::stats::count;
use crate::handover::{Lease, wire};
use crate::optin::{self, OptIn};
use crate::reason::{Reason, Refusal};

/// An answer, and the descriptor that goes with it.
type Reply = (Answer, Option<OwnedFd>);

impl Shared {
    pub(super) fn answer(&self, client: &Connected) -> Next {
        let mut bytes = [0; REQUEST_BYTES];
        // A look first: a request with a descriptor is taken only when there is
        // a thread for it, since even to close a descriptor may take long.
        let peek = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let length = match wire::receive_bytes(&client.socket, &mut bytes, peek) {
            Ok(0) => return Next::Close,
            Ok(length) => length,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Next::GoOn,
            Err(_) => return Next::Close,
        };
        client.has_asked.store(true, Ordering::Relaxed);
        let request = match bytes.get(..length) {
            Some(bytes) => Request::parse(bytes).map_err(|e| e.to_string()),
            None => Err("not a message of the handover protocol".into()),
        };
        let request = match request {
            Ok(request) => request,
            Err(what) => return self.reject(client, &what),
        };
        if !request.has_descriptor() {
            return match take_bytes(client) {
                Ok(()) => self.reply(client, self.answer_quick(client, request)),
                Err(_) => Next::Close,
            };
        }
        let Some(_slot) = self.slots.take(client.client.uid) else {
            count(&self.counters.busy);
            let busy = Refusal::new(
                Reason::Handover,
                "the server is busy with other clips of this user, or with all it can do",
            );
            return match take_bytes(client) {
                Ok(()) => self.reply(client, Err(busy)),
                Err(_) => Next::Close,
            };
        };
        let packet = wire::receive(&client.socket, &mut bytes, RecvFlags::DONTWAIT);
        let Ok(mut packet) = packet else {
            return Next::Close;
        };
        match (packet.descriptors.pop(), packet.descriptors.is_empty()) {
            (Some(clip), true) if !packet.is_cut => {
                let reply = self.answer_slow(client, request, clip);
                let next = self.reply(client, reply);
                // A close of each of the clip's descriptors waits for rclone.
                if let Some((_, lease)) = &mut *client.lease() {
                    lease.settle();
                }
                next
            }
            _ => self.refuse_malformed(client, "comes with not one descriptor"),
        }
    }

    /// Takes a packet that is no request, tells so, and ends the connection.
    fn reject(&self, client: &Connected, what: &str) -> Next {
        // The connection ends in any case.
        let _ = take_bytes(client);
        self.refuse_malformed(client, what)
    }

    fn refuse_malformed(&self, client: &Connected, what: &str) -> Next {
        count(&self.counters.rejected);
        self.log(client.client, format_args!("rejected: {what}"));
        let refusal = Refusal::new(Reason::Handover, format!("request rejected: {what}"));
        // The connection ends in any case.
        let _ = wire::send(&client.socket, &Answer::refused(&refusal).encode(), None);
        Next::Close
    }

    fn reply(&self, client: &Connected, reply: Result<Reply, Refusal>) -> Next {
        let (answer, descriptor) = reply.unwrap_or_else(|r| (Answer::refused(&r), None));
        let descriptor = descriptor.as_ref().map(AsFd::as_fd);
        match wire::send(&client.socket, &answer.encode(), descriptor) {
            Ok(()) => Next::GoOn,
            Err(e) => {
                // One that does not read, or is gone.
                if e.kind() == io::ErrorKind::WouldBlock {
                    count(&self.counters.dropped);
                }
                Next::Close
            }
        }
    }

    /// Answers what needs no FUSE.
    fn answer_quick(&self, client: &Connected, request: Request) -> Result<Reply, Refusal> {
        let mut lease = client.lease();
        match request {
            Request::More { token, from } => {
                let lease = find(lease.as_ref(), token)?;
                let ranges = part(lease.ranges(), from);
                Ok((Answer::More { token, ranges }, None))
            }
            Request::Check { token } => {
                count(&self.counters.checks);
                let checked = find(lease.as_ref(), token)?.check();
                self.end_if_refused(client, &mut lease, checked)?;
                Ok((Answer::Valid { token }, None))
            }
            // They come with a descriptor.
            Request::Ranges { .. } | Request::Whole | Request::Differs { .. } => Err(Refusal::new(
                Reason::Handover,
                "request without a descriptor",
            )),
        }
    }

    /// Answers what rclone may have to be asked for.
    fn answer_slow(
        &self,
        client: &Connected,
        request: Request,
        clip: OwnedFd,
    ) -> Result<Reply, Refusal> {
        let (asked, is_whole) = (Instant::now(), request == Request::Whole);
        let reply = match request {
            Request::Ranges { pulled } => self.ranges(client, clip, pulled),
            Request::Whole => check_enabled().and_then(|()| {
                let whole = self.source.whole(client.client, clip)?;
                count(&self.counters.whole);
                self.log(
                    client.client,
                    format_args!("whole clip, {}", whole.kind.name()),
                );
                let (kind, size) = (whole.kind, whole.size);
                Ok((Answer::Whole { kind, size }, Some(whole.fd)))
            }),
            Request::Differs { token, offset } => {
                return self.differs(client, clip.as_fd(), token, offset);
            }
            Request::More { .. } | Request::Check { .. } => {
                Err(Refusal::new(Reason::Handover, "request with a descriptor"))
            }
        };
        self.counters
            .proved(is_whole, reply.is_ok(), asked.elapsed());
        reply.inspect_err(|refusal| {
            self.counters.refused(refusal.reason);
            self.log(client.client, format_args!("refused: {refusal}"));
        })
    }

    fn ranges(
        &self,
        client: &Connected,
        clip: OwnedFd,
        pulled: Option<u64>,
    ) -> Result<Reply, Refusal> {
        check_enabled()?;
        // One proof a connection: the new one takes the old one's place.
        let mut held = client.lease();
        *held = None;
        let lease = self.source.ranges(client.client, clip, pulled)?;
        let total = lease.ranges().spans().len();
        if total > MAX_RANGES {
            let detail = format!("{total} ranges are more than a handover has: {MAX_RANGES}");
            return Err(Refusal::new(Reason::Unsupported, detail));
        }
        let data = lease.data()?;
        let (size, modified) = lease.version();
        let token = self.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        let answer = Answer::Ranges {
            token,
            size,
            modified,
            caches_reads: lease.caches_reads(),
            total: total as u32,
            ranges: part(lease.ranges(), 0),
        };
        *held = Some((token, lease));
        count(&self.counters.ranges);
        self.log(client.client, format_args!("{total} ranges handed over"));
        Ok((answer, Some(data)))
    }

    fn differs(
        &self,
        client: &Connected,
        clip: BorrowedFd<'_>,
        token: u64,
        offset: u64,
    ) -> Result<Reply, Refusal> {
        let mut lease = client.lease();
        let compared = find(lease.as_ref(), token)?.compare(clip, offset);
        self.log(
            client.client,
            format_args!("says that offset {offset} differs: {compared:?}"),
        );
        self.end_if_refused(client, &mut lease, compared)?;
        Ok((Answer::Valid { token }, None))
    }

    fn end_if_refused(
        &self,
        client: &Connected,
        lease: &mut Option<Held>,
        checked: Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        checked.inspect_err(|refusal| {
            self.counters.ended(refusal.reason);
            self.log(client.client, format_args!("proof ended: {refusal}"));
            *lease = None;
        })
    }
}

/// Takes the packet that was looked at, without its descriptors.
fn take_bytes(client: &Connected) -> io::Result<()> {
    wire::receive_bytes(&client.socket, &mut [0; 1], RecvFlags::DONTWAIT).map(drop)
}

fn find(held: Option<&Held>, token: u64) -> Result<&dyn Lease, Refusal> {
    match held {
        Some((own, lease)) if *own == token => Ok(lease.as_ref()),
        _ => Err(Refusal::new(
            Reason::Changed,
            "the server has no such proof any more",
        )),
    }
}

fn check_enabled() -> Result<(), Refusal> {
    if optin::from_env() == OptIn::Killed {
        let detail = format!("{}=0 for the server", optin::VARIABLE);
        return Err(Refusal::new(Reason::Disabled, detail));
    }
    Ok(())
}
