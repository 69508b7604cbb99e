//! From an open file to a proof.

use std::path::Path;
use std::sync::Arc;

use super::companion::{self, Companion};
use super::epoch::Epoch;
use super::origin::Origin;
use super::verify::{FileKey, check_quarantine};
use crate::cache::proof;
use crate::cache::rclone::{self, Clip, Locator};
use crate::cache::trail::{Gate, Trail};
use crate::mounts::{Dev, Mount};
use crate::reason::{Reason, Refusal};

/// What a proof is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Whichever ranges there are.
    Ranges,
    /// The whole clip, of a read-only mount, or nothing: what is refused for
    /// want of a range is refused before rclone is asked for anything.
    Whole,
}

/// Gathers the facts of a clip and decides. `pulled`: an offset that was read
/// through FUSE already.
pub(super) fn prove(
    companion: &Companion,
    pulled: Option<u64>,
    wanted: Wanted,
    trail: &mut Trail,
) -> Result<Epoch, Refusal> {
    let opened = if companion.is_writable() {
        Err(Refusal::new(
            Reason::WriteOpen,
            format!("`{}` is open for writing", companion.path().display()),
        ))
    } else {
        Ok(())
    };
    trail.step(Gate::ReadOnlyOpen, opened, |()| {
        "the descriptor cannot write".into()
    })?;
    let mount_id = trail.failure(Gate::Mount, companion.mount_id())?;
    let path = trail.failure(Gate::Mount, companion.current_path())?;
    let found = find_mount(mount_id, &path);
    let (locator, mount) = trail.step(Gate::Mount, found, |(_, mount)| {
        let (point, source) = (mount.point.display(), mount.source.display());
        format!("`{point}`, {} of `{source}`", mount.fstype)
    })?;
    let located = trail.step(Gate::Daemon, locator.locate(&mount), |located| {
        format!("pid {}", located.daemon.pid)
    })?;
    let identity = companion
        .identity()
        .map_err(|e| Refusal::from_io(format_args!("`{}`", path.display()), &e, Reason::IoError));
    let identity = trail.failure(Gate::Identity, identity)?;
    let key = FileKey::new(Some(located.daemon.clone()), identity);
    check_quarantine(&key)?;
    // Before anything is asked of rclone: for such a mount no answer helps.
    proof::check_mount(&located.mount_facts(), trail)?;
    if wanted == Wanted::Whole && !located.read_only {
        let detail = format!(
            "`{}` is writable: a program would not see what is written through the mount",
            mount.point.display()
        );
        return trail.failure(Gate::Access, Err(Refusal::new(Reason::Unsupported, detail)));
    }
    let inside = mount.inside(&path).ok_or_else(|| {
        let (path, point) = (path.display(), mount.point.display());
        let detail = format!("`{path}` is not below its mount point `{point}`");
        Refusal::new(Reason::Ambiguous, detail)
    });
    let inside = trail.failure(Gate::Identity, inside)?;
    let clip = Clip {
        located: &located,
        path: &path,
        inside: &inside,
        pulled,
        whole: wanted == Wanted::Whole,
    };
    let gathered = rclone::gather(&clip, companion, trail)?;
    let proof = proof::prove(&gathered.facts, trail)?;
    Ok(Epoch::new(
        proof,
        gathered.data,
        Origin::metadata(gathered.metadata),
        located.folders.data_path(&inside),
        located.says_it_caches_reads(),
        mount.dev,
        key,
    ))
}

/// Whether a superblock that was read-only still is, wherever it is mounted.
pub(super) fn check_read_only(dev: Dev) -> Result<(), Refusal> {
    let locator = Locator::now()?;
    let mut mounts = locator.table().iter();
    match mounts.find(|m| m.dev == dev && !m.read_only) {
        None => Ok(()),
        Some(mount) => Err(Refusal::new(
            Reason::Changed,
            format!("`{}` is writable", mount.point.display()),
        )),
    }
}

/// The rclone mount of this id. What the table says of it is checked against
/// the kernel: a mount point moves without notice when a folder above it is
/// renamed, and another mount may cover it.
fn find_mount(id: u64, path: &Path) -> Result<(Arc<Locator>, Mount), Refusal> {
    for read in [Locator::now, Locator::anew] {
        let locator = read()?;
        let Some(mount) = locator.table().by_id(id) else {
            continue;
        };
        if !mount.is_rclone() {
            let reason = if mount.is_fuse() {
                Reason::NotRclone
            } else {
                Reason::NotFuse
            };
            let detail = format!("`{}` is on {}", path.display(), mount.fstype);
            return Err(Refusal::new(reason, detail));
        }
        if companion::mount_id_of(&mount.point) == Ok(id) {
            let mount = mount.clone();
            return Ok((locator, mount));
        }
    }
    Err(Refusal::new(
        Reason::Ambiguous,
        format!(
            "`{}`: its mount is gone, covered or not ours to see",
            path.display()
        ),
    ))
}
