//! A clip on a mount of ours, which this process serves meanwhile.

use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use tempfile::TempDir;

use super::{BenchError, Engine};
use crate::optin::{self, OptIn};
use crate::reexport::{Error, Mounted, Options, Passthrough, Stats, THREADS, Unmounter, Watch};
use crate::snapshot::{SnapshotMode, SnapshotOptions};

/// Memory for copies, bytes: a clip's own size counts, and what memory there is.
const BUDGET: u64 = u64::MAX;

pub(super) struct Remount {
    clip: PathBuf,
    end: Unmounter,
    watch: Watch,
    serving: Option<JoinHandle<Result<Stats, Error>>>,
    /// Removed at last.
    _folder: TempDir,
}

impl Remount {
    /// Mounts the clip's folder: by passthrough, which copies the clip where its
    /// cache has no reflinks, or by ranges alone.
    pub(super) fn of(clip: &Path, engine: Engine) -> Result<Self, BenchError> {
        let refused = |why: String| BenchError::Engine {
            path: clip.into(),
            engine: engine.name(),
            why,
        };
        if optin::from_env() == OptIn::Killed {
            let variable = optin::VARIABLE;
            return Err(refused(format!("{variable}=0 sends mounts through fuse")));
        }
        let io = |error| BenchError::Io {
            path: clip.into(),
            error,
        };
        let clip = std::fs::canonicalize(clip).map_err(io)?;
        let (Some(source), Some(name)) = (clip.parent(), clip.file_name()) else {
            return Err(refused("it is in no folder".into()));
        };
        let folder = tempfile::Builder::new()
            .prefix("vmafx-bypass-")
            .tempdir()
            .map_err(io)?;
        let passthrough = match engine {
            Engine::Mount => Passthrough::Require,
            _ => Passthrough::Never,
        };
        let mounted = Mounted::mount(&Options {
            source: source.into(),
            mountpoint: folder.path().into(),
            passthrough,
            snapshots: SnapshotOptions {
                mode: SnapshotMode::Auto,
                copy_budget: BUDGET,
            },
            allow_other: false,
            threads: THREADS,
            options: Vec::new(),
        })
        .map_err(|error| refused(error.to_string()))?;
        Ok(Self {
            clip: mounted.mountpoint().join(name),
            end: mounted.unmounter(),
            watch: mounted.watch(),
            serving: Some(std::thread::spawn(move || mounted.serve())),
            _folder: folder,
        })
    }

    pub(super) fn clip(&self) -> &Path {
        &self.clip
    }

    pub(super) fn fuse_bytes(&self) -> u64 {
        self.watch.stats().fuse_bytes
    }
}

impl Drop for Remount {
    fn drop(&mut self) {
        // Lazily, where a file is open: it is served to its end.
        if self.end.unmount().is_ok()
            && let Some(serving) = self.serving.take()
        {
            let _ = serving.join();
        }
    }
}
