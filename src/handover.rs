//! Cache files handed over a Unix socket, to processes that may not open them.
//!
//! rclone's cache is its user's alone, and may be in another container. A
//! [`Server`], in a process that may read it, gives to a client that holds a
//! clip open through FUSE the cache file's descriptor, read-only, and the
//! ranges that are proven; or a file with the whole clip that never changes.
//! To hold the clip open is the proof that it may be read: no path travels to
//! the server. docs/HANDOVER.md has the messages and their rules.

mod client;
mod given;
mod listener;
pub mod protocol;
mod server;
mod stats;
mod wire;

use std::os::fd::{BorrowedFd, OwnedFd};

pub(crate) use client::Connection;
pub use client::{VARIABLE, WholeFd, answers, socket_from_env, whole};
pub use given::Given;
pub use listener::Owner;
pub use server::{Bound, Log, Server, ServerError, ServerObserver, ServerOptions};
pub use stats::{HandoverStats, ProofTimes};

use crate::cache::proof::Timestamp;
use crate::cache::ranges::Ranges;
pub use crate::histogram::Durations;
use crate::reason::Refusal;

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Client {
    /// Its pid when it connected, as the server sees it; 0 where it does not.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// Where a server has from what it hands over: [`Clips`](crate::Clips),
/// or a test's own.
pub trait Source: Send + Sync + 'static {
    /// Proves a clip's ranges. The descriptor may be of anything, and be shared
    /// with the client: neither its offset nor its flags may be changed.
    ///
    /// # Errors
    /// Why there is nothing to hand over.
    fn ranges(
        &self,
        client: Client,
        clip: OwnedFd,
        pulled: Option<u64>,
    ) -> Result<Box<dyn Lease>, Refusal>;

    /// A file with the whole clip, likewise.
    ///
    /// # Errors
    /// Likewise.
    fn whole(&self, client: Client, clip: OwnedFd) -> Result<WholeFd, Refusal>;
}

/// A proof that was handed over, as long as the client wants it. Once settled,
/// to drop it must not wait for FUSE.
pub trait Lease: Send {
    /// Closes what only the proof needed: the client has its answer, and this
    /// may wait for FUSE.
    fn settle(&mut self);

    /// A description of the cache file of the client's own, which cannot write.
    ///
    /// # Errors
    /// Where it cannot be opened.
    fn data(&self) -> Result<OwnedFd, Refusal>;

    /// The clip's size, bytes, and its modification time.
    fn version(&self) -> (u64, Timestamp);

    /// What of the clip is proven.
    fn ranges(&self) -> &Ranges;

    /// Whether all that is read through FUSE goes into the cache file.
    fn caches_reads(&self) -> bool;

    /// Whether the proof still holds; does not ask FUSE.
    ///
    /// # Errors
    /// Why it does not, for good.
    fn check(&self) -> Result<(), Refusal>;

    /// Compares the cache with FUSE around an offset, where the client says
    /// that they differ.
    ///
    /// # Errors
    /// As of [`check`](Self::check), or that they do.
    fn compare(&self, clip: BorrowedFd<'_>, offset: u64) -> Result<(), Refusal>;
}
