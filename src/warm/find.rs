//! From paths to clips, and to what is missing of each.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use super::{Progress, Report, State};
use crate::cache::proof::{Timestamp, check_mount};
use crate::cache::ranges::Ranges;
use crate::cache::rclone::{Located, present};
use crate::cache::trail::Trail;
use crate::mounts::{Dev, Mount, MountTable};
use crate::reason::{Reason, Refusal};

/// An rclone mount and its cache.
#[derive(Debug)]
pub struct Site {
    /// Where it is mounted.
    pub point: PathBuf,
    pub(super) located: Located,
    /// Set once a read has shown that nothing is cached here.
    pub(super) caches_nothing: OnceLock<Refusal>,
    /// Bytes that are still to be read of the clips that are being read.
    pub(super) under_way: Mutex<u64>,
}

/// A clip on an rclone mount.
#[derive(Debug, Clone)]
pub struct Clip {
    pub(super) path: PathBuf,
    /// Its path inside the mount.
    pub(super) inside: PathBuf,
    pub(super) site: Arc<Site>,
    pub(super) size: u64,
    pub(super) modified: Timestamp,
    /// What the metadata listed when it was found, and why not all.
    pub(super) present: Ranges,
    pub(super) refusal: Option<Refusal>,
}

impl Clip {
    /// Its absolute path, without symlinks.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that are to be read.
    #[must_use]
    pub fn missing_bytes(&self) -> u64 {
        self.size - self.present.bytes()
    }

    /// Looks at the metadata again, for a size and time that FUSE shows.
    pub(super) fn present(&self, size: u64, modified: Timestamp) -> (Ranges, Option<Refusal>) {
        present(&self.site.located.folders, &self.inside, size, modified)
    }

    /// Whether, for a reason that lies in the mount, no clip of it can be judged.
    pub(super) fn is_hidden(&self) -> bool {
        self.is_refused_as(Reason::Permission)
    }

    /// Whether nobody can tell where it is in the cache, because of its name.
    pub(super) fn is_unknown(&self) -> bool {
        self.is_refused_as(Reason::Unsupported)
    }

    fn is_refused_as(&self, reason: Reason) -> bool {
        self.refusal
            .as_ref()
            .is_some_and(|refusal| refusal.reason == reason)
    }
}

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// Clips, each once, in the order of the paths; those of a folder by their
    /// names, before those of the folders below it.
    pub clips: Vec<Clip>,
    /// What could not be looked at.
    pub failed: Vec<Report>,
    /// Symlinks below folders, which are not followed.
    pub symlinks: u64,
    /// Whether `stop` ended the search.
    pub stopped: bool,
}

impl Found {
    /// What speaks against the mounts that the clips are on, a line each.
    #[must_use]
    pub fn doubts(&self) -> Vec<String> {
        let mut doubts = Vec::new();
        for (site, clips) in self.by_site() {
            let located = &site.located;
            let point = site.point.display();
            if let Err(refusal) = check_mount(&located.mount_facts(), &mut Trail::off()) {
                let remedy = refusal.reason.remedy();
                doubts.push(format!(
                    "`{point}`: clips can be cached, but not bypassed: {refusal}; {remedy}"
                ));
            }
            let missing: u64 = clips.iter().map(|clip| clip.missing_bytes()).sum();
            if let Some(free) = site.free_bytes().filter(|free| *free < missing) {
                doubts.push(format!(
                    "`{point}`: {missing} bytes are missing, and the cache's disk has {free} left"
                ));
            }
        }
        doubts
    }

    /// Mounts whose cache cannot keep all of the clips, a line each: rclone
    /// evicts some of them again, if not at once.
    #[must_use]
    pub fn overflows(&self) -> Vec<String> {
        let overflow = |(site, clips): (&Arc<Site>, Vec<&Clip>)| {
            let bytes: u64 = clips.iter().map(|clip| clip.size).sum();
            let limit = site.located.cache_limit().filter(|limit| *limit < bytes)?;
            Some(format!(
                "`{}`: the clips have {bytes} bytes, and rclone evicts beyond {limit}; raise \
                 --vfs-cache-max-size",
                site.point.display()
            ))
        };
        self.by_site().into_iter().filter_map(overflow).collect()
    }

    fn by_site(&self) -> Vec<(&Arc<Site>, Vec<&Clip>)> {
        let mut sites: Vec<(&Arc<Site>, Vec<&Clip>)> = Vec::new();
        for clip in &self.clips {
            match sites
                .iter_mut()
                .find(|(site, _)| Arc::ptr_eq(site, &clip.site))
            {
                Some((_, clips)) => clips.push(clip),
                None => sites.push((&clip.site, vec![clip])),
            }
        }
        sites
    }
}

impl Site {
    /// What is left on the cache's disk.
    pub(super) fn free_bytes(&self) -> Option<u64> {
        let folder = self.located.folders.data_path(Path::new(""));
        // Before its first clip, the mount's own folder is not there yet.
        let stat = folder
            .ancestors()
            .find_map(|folder| nix::sys::statvfs::statvfs(folder).ok())?;
        Some(stat.blocks_available() * stat.fragment_size())
    }
}

/// Finds the clips that files or folders on rclone mounts name, folders with
/// all that is below them, and looks up what is missing. Opens no clip.
#[must_use]
pub fn find(
    paths: &[PathBuf],
    progress: &(dyn Fn(Progress<'_>) + Sync),
    stop: &(dyn Fn() -> bool + Sync),
) -> Found {
    let mut search = Search {
        table: MountTable::default(),
        sites: HashMap::new(),
        seen: HashSet::new(),
        found: Found::default(),
        progress,
        stop,
    };
    match MountTable::read() {
        Ok(table) => search.table = table,
        Err(e) => {
            let refusal = Refusal::from_io("`/proc/self/mountinfo`", &e, Reason::IoError);
            let refused = |path: &PathBuf| Report::of_path(path, State::Refused, refusal.clone());
            search.found.failed = paths.iter().map(refused).collect();
            return search.found;
        }
    }
    for path in paths {
        search.argument(path);
    }
    search.found
}

struct Search<'a> {
    table: MountTable,
    /// By superblock; a mount whose cache cannot be located is asked once.
    sites: HashMap<Dev, Result<Arc<Site>, Refusal>>,
    seen: HashSet<(Dev, PathBuf)>,
    found: Found,
    progress: &'a (dyn Fn(Progress<'_>) + Sync),
    stop: &'a (dyn Fn() -> bool + Sync),
}

impl Search<'_> {
    /// A path as the user gave it: symlinks are followed.
    fn argument(&mut self, given: &Path) {
        let found = fs::canonicalize(given).and_then(|path| Ok((fs::metadata(&path)?, path)));
        let (metadata, path) = match found {
            Ok(found) => found,
            Err(e) => return self.unreadable(given, &e),
        };
        // A mount that is refused is refused once, not for each of its clips.
        if let Err((state, refusal)) = self.site(&path, &metadata) {
            return self
                .found
                .failed
                .push(Report::of_path(given, state, refusal));
        }
        if metadata.is_dir() {
            self.folder(path);
        } else if metadata.is_file() {
            self.clip(path, &metadata);
        } else {
            let detail = format!("`{}` is neither a file nor a folder", path.display());
            let refusal = Refusal::new(Reason::Unsupported, detail);
            let report = Report::of_path(given, State::Failed, refusal);
            self.found.failed.push(report);
        }
    }

    fn unreadable(&mut self, path: &Path, error: &io::Error) {
        let what = format_args!("`{}`", path.display());
        let refusal = Refusal::from_io(what, error, Reason::IoError);
        let report = Report::of_path(path, State::Failed, refusal);
        self.found.failed.push(report);
    }

    /// A folder and all below it; not by recursion, which deep folders might exhaust.
    fn folder(&mut self, top: PathBuf) {
        let mut folders = vec![top];
        while let Some(folder) = folders.pop() {
            if (self.stop)() {
                self.found.stopped = true;
                return;
            }
            let mut names = Vec::new();
            let listed = fs::read_dir(&folder).and_then(|entries| {
                for entry in entries {
                    let entry = entry?;
                    names.push((entry.path(), entry.file_type()?));
                }
                Ok(())
            });
            // What was listed before an error is still there.
            if let Err(e) = listed {
                self.unreadable(&folder, &e);
            }
            names.sort_by(|(a, _), (b, _)| a.cmp(b));
            let mut below = Vec::new();
            for (path, kind) in names {
                if kind.is_dir() {
                    below.push(path);
                } else if kind.is_symlink() {
                    self.found.symlinks += 1;
                } else if kind.is_file() {
                    if (self.stop)() {
                        self.found.stopped = true;
                        return;
                    }
                    match fs::symlink_metadata(&path) {
                        Ok(metadata) => self.clip(path, &metadata),
                        Err(e) => self.unreadable(&path, &e),
                    }
                }
            }
            folders.extend(below.into_iter().rev());
        }
    }

    fn clip(&mut self, path: PathBuf, metadata: &fs::Metadata) {
        let (site, inside) = match self.site(&path, metadata) {
            Ok(found) => found,
            Err((state, refusal)) => {
                return self
                    .found
                    .failed
                    .push(Report::of_path(&path, state, refusal));
            }
        };
        let dev = Dev::from_st_dev(metadata.dev());
        if !self.seen.insert((dev, inside.clone())) {
            return;
        }
        let mut clip = Clip {
            path,
            inside,
            site,
            size: metadata.len(),
            modified: Timestamp::modified(metadata),
            present: Ranges::default(),
            refusal: None,
        };
        (clip.present, clip.refusal) = clip.present(clip.size, clip.modified);
        self.found.clips.push(clip);
        (self.progress)(Progress::Found(self.found.clips.len()));
    }

    /// The rclone mount that a path without symlinks is on, and its path inside.
    fn site(
        &mut self,
        path: &Path,
        metadata: &fs::Metadata,
    ) -> Result<(Arc<Site>, PathBuf), (State, Refusal)> {
        let failed = |reason, detail| (State::Failed, Refusal::new(reason, detail));
        let shown = path.display();
        let dev = Dev::from_st_dev(metadata.dev());
        let Some(mount) = self.table.containing(path).filter(|m| m.dev == dev) else {
            // btrfs has device numbers of its own for subvolumes; but a mount
            // that came or went meanwhile looks the same.
            let detail = format!("`{shown}` is on no rclone mount that the mount table shows");
            return Err(failed(Reason::NotRclone, detail));
        };
        if !mount.is_rclone() {
            let reason = if mount.is_fuse() {
                Reason::NotRclone
            } else {
                Reason::NotFuse
            };
            let detail = format!("`{shown}` is on {}, not on an rclone mount", mount.fstype);
            return Err(failed(reason, detail));
        }
        let Some(inside) = mount.inside(path) else {
            let point = mount.point.display();
            let detail = format!("`{shown}` is not below its mount point `{point}`");
            return Err(failed(Reason::Ambiguous, detail));
        };
        let locate = |mount: &Mount| {
            Ok(Arc::new(Site {
                point: mount.point.clone(),
                located: Located::find(mount, &self.table)?,
                caches_nothing: OnceLock::new(),
                under_way: Mutex::new(0),
            }))
        };
        let site = self.sites.entry(dev).or_insert_with(|| locate(mount));
        match site {
            Ok(site) => Ok((Arc::clone(site), inside)),
            Err(refusal) => Err((State::Refused, refusal.clone())),
        }
    }
}
