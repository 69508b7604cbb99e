//! A proof that a server hands over.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};

use super::companion::Companion;
use super::epoch::{Epoch, Outcome};
use super::prove::{Wanted, prove};
use super::verify::{Verifier, Verify};
use crate::cache::proof::Timestamp;
use crate::cache::ranges::Ranges;
use crate::cache::trail::Trail;
use crate::handover::Lease;
use crate::reason::{Reason, Refusal};
use crate::sys;

/// Bytes that are compared around an offset that is said to differ.
const COMPARED: u64 = 4096;

/// A proof without the clip's FUSE descriptor, which the client has, and whose
/// closing could wait for rclone.
pub(crate) struct Proven {
    epoch: Epoch,
    /// What the proof was had by, until the client has its answer: the clip's
    /// descriptor as it came, and opened anew.
    clip: Option<(Arc<File>, Companion)>,
    /// Whom it is for.
    uid: u32,
}

impl Proven {
    /// Proves a clip that a user has opened, on a read-only mount.
    pub(crate) fn of(clip: OwnedFd, pulled: Option<u64>, uid: u32) -> Result<Self, Refusal> {
        let companion = Companion::from_fd(clip)
            .map_err(|e| Refusal::from_io("the clip's descriptor", &e, Reason::Unsupported))?;
        let came = companion.share();
        let epoch = prove(&companion, pulled, Wanted::Ranges, &mut Trail::off())?;
        if epoch.is_writable() {
            let detail = "a writable mount's clips are not handed over";
            return Err(Refusal::new(Reason::Unsupported, detail));
        }
        let mode = epoch
            .data()
            .metadata()
            .map_err(|e| Refusal::from_io("fstat of the cache file", &e, Reason::IoError))?
            .mode();
        if mode & 0o022 != 0 {
            // Whoever has a descriptor can open the file anew, by /proc, as its
            // mode lets him, whatever the folders above it do.
            let detail = format!(
                "the cache file's mode {:o} lets others write: rclone makes it 0600",
                mode & 0o7777
            );
            return Err(Refusal::new(Reason::Permission, detail));
        }
        Ok(Self {
            epoch,
            clip: Some((came, companion)),
            uid,
        })
    }
}

impl Lease for Proven {
    fn settle(&mut self) {
        self.clip = None;
    }

    fn data(&self) -> Result<OwnedFd, Refusal> {
        let data = self.epoch.data();
        let error = match sys::open_on_read_only_mount(data, self.epoch.key().pid()) {
            Ok(opened) => return Ok(opened),
            Err(error) => error,
        };
        let io = |e: std::io::Error| {
            Refusal::from_io("opening the cache file anew", &e, Reason::IoError)
        };
        // Whoever has the rights to write, and only no way to the file, could now
        // write: in a container, say.
        let owner = data.metadata().map_err(io)?.uid();
        if self.uid == 0 || self.uid == owner {
            let detail = format!(
                "uid {} could write to the cache file that it would be given, for the server \
                 cannot give it by a read-only mount: {error}",
                self.uid
            );
            return Err(Refusal::new(Reason::Permission, detail));
        }
        let path = format!("/proc/self/fd/{}", data.as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY;
        rustix::fs::open(path, flags, Mode::empty()).map_err(|e| io(e.into()))
    }

    fn version(&self) -> (u64, Timestamp) {
        self.epoch.version()
    }

    fn ranges(&self) -> &Ranges {
        &self.epoch.proof().ranges
    }

    fn caches_reads(&self) -> bool {
        self.epoch.caches_reads()
    }

    // rclone has written the metadata again when the server closed the clip. On
    // a read-only mount the same version in the same linked file is enough.
    fn check(&self) -> Result<(), Refusal> {
        self.epoch.check_version()
    }

    fn compare(&self, clip: BorrowedFd<'_>, offset: u64) -> Result<(), Refusal> {
        self.check()?;
        let io = |e: std::io::Error| Refusal::from_io("the clip", &e, Reason::IoError);
        // By the client's own description, which a read at an offset leaves as
        // it is: to open the clip anew would drop the pages that the client saw.
        let clip = clip.try_clone_to_owned().and_then(Companion::from_fd);
        let clip = clip.map_err(io)?;
        if clip.identity().map_err(io)? != self.epoch.key().identity() {
            let detail = "the descriptor is not of the clip that was handed over";
            return Err(Refusal::new(Reason::Changed, detail));
        }
        let start = offset / COMPARED * COMPARED;
        let mut bytes = vec![0; COMPARED as usize];
        // What is not from the cache cannot differ.
        let Outcome::Cache(n) = self.epoch.read(&mut bytes, start, &clip)? else {
            return Ok(());
        };
        Verifier::new(Verify::Full)
            .verify(&bytes[..n], start, &self.epoch, &clip)
            .map(drop)
    }
}
