//! Whether another rclone uses the same part of a cache.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::daemon::{Daemon, all_rclones, denied};
use super::locate::{
    Folders, first_name, local_folder, name_and_root, remote_folder, start_of, under,
};
use super::names;
use super::start::Start;
use crate::mounts::{Dev, Mount, MountTable};
use crate::reason::{Reason, Refusal};

/// Which other rclone has the same remote in the same cache folder: one whose
/// mount's folder in the cache lies in ours or ours in its, or any process that
/// names the remote among its arguments and does more than mount (`serve`). One
/// of which that cannot be said counts as one that does.
///
/// # Errors
/// Where the question cannot be asked, which must not look like a no.
pub(super) fn shares_cache(
    mount: &Mount,
    table: &MountTable,
    own: &Daemon,
    folders: &Folders,
) -> Result<Option<String>, Refusal> {
    let cache = folders.cache_folder();
    let own_cache = match fs::metadata(&cache) {
        Ok(folder) => (folder.dev(), folder.ino()),
        // Nothing to share; a later step tells.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => {
            let what = format_args!("`{}`", cache.display());
            return Err(Refusal::from_io(what, &e, Reason::IoError));
        }
    };
    let same_cache = |daemon: &Daemon, start: &Start| {
        let Ok(folder) = start.cache_folder() else {
            return !daemon.has_exited();
        };
        let its = daemon
            .root(start)
            .and_then(|root| fs::metadata(under(&root, &folder)));
        match its {
            Ok(other) => (other.dev(), other.ino()) == own_cache,
            // Ours exists; a folder that does not is another's. Nor does a
            // process share it that has exited meanwhile.
            Err(e) => e.kind() != io::ErrorKind::NotFound && !daemon.has_exited(),
        }
    };
    // One that has exited shares nothing.
    let started = |daemon: &Daemon| match start_of(daemon) {
        Ok(start) => Ok(Some(start)),
        Err(_) if daemon.has_exited() => Ok(None),
        Err(refusal) => Err(refusal),
    };
    for other in table.iter().filter(|m| m.is_rclone() && m.dev != mount.dev) {
        let overlaps = may_overlap(other, folders.remote());
        let point = other.point.display();
        let servers = match Daemon::candidates(other) {
            Ok(servers) => servers,
            Err(refusal) if overlaps => return Ok(Some(format!("perhaps `{point}`: {refusal}"))),
            // Should it be hidden by its name, too, its daemon is met below.
            Err(_) => continue,
        };
        // Of several that may serve it, each counts; and so does our own, which
        // may keep two caches of one remote under different options.
        for daemon in &servers {
            if let Some(start) = started(daemon)?
                && (overlaps || start.option("devname").is_some())
                && same_cache(daemon, &start)
            {
                return Ok(Some(format!("pid {} at `{point}`", daemon.pid)));
            }
        }
    }
    let name = first_name(folders.remote());
    for daemon in all_rclones()?.iter().filter(|daemon| *daemon != own) {
        let Some(start) = started(daemon)? else {
            continue;
        };
        let connections = match daemon.connections() {
            Ok(connections) => connections,
            Err(_) if daemon.has_exited() => continue,
            // Its arguments alone tell, then.
            Err(e) if denied(&e) && start.is_hidden() => Vec::new(),
            Err(e) => {
                let what = format_args!("descriptors of pid {}", daemon.pid);
                return Err(Refusal::from_io(what, &e, Reason::IoError));
            }
        };
        let named = || start.remotes().any(|remote| remote == name);
        let uses = !serves_mounts_alone(&connections, &start) && named();
        // Which others of our table a daemon serves was asked above, where the
        // answer may have been none.
        let others = connections.iter().flatten();
        let mut others = others.filter(|&&minor| minor != mount.dev.minor());
        let mut mounts = || others.any(|&minor| may_use(minor, daemon, table, &start, folders));
        if (uses || mounts()) && same_cache(daemon, &start) && !daemon.is_forked_from(own) {
            return Ok(Some(format!("pid {}", daemon.pid)));
        }
    }
    Ok(None)
}

/// Whether a mount's cache may be in the same folder as that of `remote`.
fn may_overlap(mount: &Mount, remote: &Path) -> bool {
    let own = [Some(remote_folder(mount)), local_folder(mount)];
    let mut own = own.into_iter().flatten();
    names::check(&name_and_root(mount)).is_err()
        || own.any(|its| its.starts_with(remote) || remote.starts_with(&its))
}

/// Whether all that a daemon does with remotes shows in mount tables.
fn serves_mounts_alone(connections: &[Option<u32>], start: &Start) -> bool {
    !start.may_serve_more() && !connections.is_empty() && connections.iter().all(Option::is_some)
}

/// Whether a mount that a daemon serves, by its minor device number, may use
/// the cache in `folders`. One that is not in our table is in the daemon's own,
/// that of its mount namespace.
fn may_use(
    minor: u32,
    daemon: &Daemon,
    table: &MountTable,
    start: &Start,
    folders: &Folders,
) -> bool {
    let overlaps = |table: &MountTable| {
        let mut mounts = table.iter();
        let mount = mounts.find(|m| m.dev == Dev::new(0, minor))?;
        Some(start.option("devname").is_some() || may_overlap(mount, folders.remote()))
    };
    let elsewhere = || overlaps(&daemon.mounts().ok()?);
    // What cannot be looked up may be any mount.
    overlaps(table).or_else(elsewhere).unwrap_or(true)
}
