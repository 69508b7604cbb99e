//! A proof from a handover server, where the cache is not ours to open.

use std::cell::RefCell;
use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::companion::Companion;
use super::epoch::{Epoch, changed};
use super::origin::{Origin, is_hidden};
use super::prove::{self, Wanted, check_read_only};
use super::verify::{FileKey, check_quarantine};
use crate::cache::proof::{Proof, Timestamp, check_file_system};
use crate::cache::rclone::Locator;
use crate::cache::trail::{Gate, Trail};
use crate::handover::{Connection, VARIABLE, socket_from_env};
use crate::mounts::{Dev, Mount};
use crate::reason::{Reason, Refusal};

/// As small as file systems tell holes, bytes.
const MIN_BLOCK: u64 = 4096;
/// How long a mount whose cache is hidden from us is believed to stay so: to
/// look for its daemon takes 10 ms where many processes run.
const HIDDEN: Duration = Duration::from_secs(60);

/// Which server is asked, and when.
#[derive(Debug, Clone, Default)]
pub(super) struct Via {
    /// `None`: no server.
    pub(super) socket: Option<PathBuf>,
    /// Whether we do not even look for a cache that we may open ourselves.
    pub(super) alone: bool,
}

impl Via {
    /// The server that the environment names, if it does.
    pub(super) fn from_env() -> Self {
        Self {
            socket: socket_from_env(),
            alone: false,
        }
    }

    /// Proves a clip: by ourselves, or by the server where its cache is not ours
    /// to see. `trail` is told of each gate that is come to, the server being one.
    pub(super) fn prove(
        &self,
        companion: &Companion,
        pulled: Option<u64>,
        trail: &mut Trail,
    ) -> Result<Epoch, Refusal> {
        // Either may be asked, or both in turn.
        let trail = RefCell::new(trail);
        let own = || prove::prove(companion, pulled, Wanted::Ranges, &mut trail.borrow_mut());
        let Some(socket) = &self.socket else {
            if self.alone {
                let detail = format!("no server is named, by {VARIABLE} or otherwise");
                let unnamed = Err(Refusal::new(Reason::Handover, detail));
                return trail.borrow_mut().failure(Gate::Handover, unnamed);
            }
            return own();
        };
        let server = || {
            let given = from_server(socket, companion, pulled);
            trail.borrow_mut().step(Gate::Handover, given, |epoch| {
                let (bytes, socket) = (epoch.proven_bytes(), socket.display());
                format!("{bytes} bytes, by the server at `{socket}`")
            })
        };
        if self.alone {
            return server();
        }
        let own_first = is_root() || !is_on_rclone(companion);
        by_either(own_first, dev(companion), own, server)
    }
}

pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// What we prove ourselves, or a server does where the cache is not ours to see.
///
/// `own_first` is for root. Others see too little of rclone to know what hides
/// from them, and to look for it takes 10 times as long as to ask.
pub(crate) fn by_either<T>(
    own_first: bool,
    dev: Dev,
    own: impl FnOnce() -> Result<T, Refusal>,
    server: impl FnOnce() -> Result<T, Refusal>,
) -> Result<T, Refusal> {
    if own_first {
        return match own() {
            Err(refusal) if is_hidden(refusal.reason) => server(),
            result => result,
        };
    }
    let refusal = match server() {
        Ok(found) => return Ok(found),
        Err(refusal) => refusal,
    };
    let lasts = matches!(refusal.reason, Reason::WriteOpen | Reason::Quarantined);
    if lasts || is_known_hidden(dev) {
        return Err(refusal);
    }
    own().map_err(|own| {
        if is_hidden(own.reason) {
            note_hidden(dev);
        }
        refusal
    })
}

/// Whether the clip is on an rclone mount, by our mount table.
fn is_on_rclone(companion: &Companion) -> bool {
    companion.mount_id().is_ok_and(|id| {
        let locator = Locator::now();
        locator.is_ok_and(|locator| locator.table().by_id(id).is_some_and(Mount::is_rclone))
    })
}

/// The superblock of the clip's mount; one of nothing, where it cannot be told.
fn dev(companion: &Companion) -> Dev {
    companion
        .identity()
        .map_or(Dev(u32::MAX), |(dev, _)| Dev::from_st_dev(dev))
}

/// The mounts whose caches were hidden from us, since when.
static KNOWN_HIDDEN: Mutex<Option<HashMap<Dev, Instant>>> = Mutex::new(None);

fn is_known_hidden(dev: Dev) -> bool {
    let known = KNOWN_HIDDEN.lock().unwrap_or_else(PoisonError::into_inner);
    known
        .as_ref()
        .and_then(|known| known.get(&dev))
        .is_some_and(|since| since.elapsed() < HIDDEN)
}

fn note_hidden(dev: Dev) {
    let mut known = KNOWN_HIDDEN.lock().unwrap_or_else(PoisonError::into_inner);
    let known = known.get_or_insert_default();
    if known
        .get(&dev)
        .is_none_or(|since| since.elapsed() >= HIDDEN)
    {
        known.insert(dev, Instant::now());
    }
}

/// What the server proves, as far as it agrees with what we see.
fn from_server(
    socket: &Path,
    companion: &Companion,
    pulled: Option<u64>,
) -> Result<Epoch, Refusal> {
    let io = |what: &str, e: std::io::Error| Refusal::from_io(what, &e, Reason::IoError);
    if companion.is_writable() {
        return Err(Refusal::new(
            Reason::WriteOpen,
            format!("`{}` is open for writing", companion.path().display()),
        ));
    }
    if !companion.is_fresh() {
        companion
            .renew()
            .map_err(|e| io("opening the clip anew", e))?;
    }
    let identity = companion
        .identity()
        .map_err(|e| io("fstat of the clip", e))?;
    let dev = Dev::from_st_dev(identity.0);
    let key = FileKey::new(None, identity);
    check_quarantine(&key)?;
    check_read_only(dev).map_err(|refusal| {
        let detail = format!(
            "a server hands over clips of read-only mounts: {}",
            refusal.detail
        );
        match refusal.reason {
            Reason::Changed => Refusal::new(Reason::Unsupported, detail),
            _ => refusal,
        }
    })?;
    let granted = Connection::open(socket)?.ranges(companion.share().as_fd(), pulled)?;
    // That it is a regular file of this size that cannot be written is checked.
    let data = granted.data;
    let file_system = rustix::fs::fstatfs(&data).map_err(|e| io("fstatfs", e.into()))?;
    check_file_system(file_system.f_type as i64)?;
    let stat = rustix::fs::fstat(&data).map_err(|e| io("fstat", e.into()))?;
    if stat.st_nlink != 1 {
        return Err(changed("was unlinked"));
    }
    // The server has looked the path up: the kernel's attributes are new.
    let fuse = companion
        .metadata()
        .map_err(|e| io("fstat of the clip", e))?;
    let shown = (fuse.len(), Timestamp::modified(&fuse));
    if shown != (granted.size, granted.modified) {
        return Err(changed("is not of the version that fuse shows"));
    }
    let proof = Proof {
        size: granted.size,
        modified: granted.modified,
        listed: granted.ranges.clone(),
        ranges: granted.ranges,
        block: (stat.st_blksize as u64).max(MIN_BLOCK),
        writable: false,
    };
    Ok(Epoch::new(
        proof,
        data,
        Origin::server(granted.connection),
        companion.path().to_path_buf(),
        granted.caches_reads,
        dev,
        key,
    ))
}
