//! The engines: a clip, opened each way.

use std::fs::File;
use std::io::{self, BufRead, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use tempfile::NamedTempFile;

#[cfg(feature = "mount")]
use super::remount::Remount;
use super::{BenchError, Engine};
use crate::snapshot::{Mapped, SnapshotMode, SnapshotOptions, Snapshots};
use crate::{BypassFile, BypassOptions};

/// An open clip.
pub(super) enum Opened {
    Plain(File),
    Bypass(Box<BypassFile>),
    /// Its buffer is lent; of which so many bytes were used since.
    Lent {
        file: Box<BypassFile>,
        used: usize,
    },
    Mapped {
        map: Mapped,
        position: usize,
    },
}

/// What engines need that is made before and kept while a clip is measured.
pub(super) struct Ways<'a> {
    clip: &'a Path,
    /// Which handover server is asked.
    options: BypassOptions,
    snapshots: Snapshots,
    copy: Option<NamedTempFile>,
    #[cfg(feature = "mount")]
    remounts: Vec<(Engine, Remount)>,
}

impl<'a> Ways<'a> {
    pub(super) fn open(
        clip: &'a Path,
        engines: &[Engine],
        socket: Option<&Path>,
    ) -> Result<Self, BenchError> {
        let copy = engines.contains(&Engine::Copy).then(|| copy_of(clip));
        #[cfg(feature = "mount")]
        let mounting = engines
            .iter()
            .filter(|engine| matches!(engine, Engine::Mount | Engine::MountRanges));
        let options = BypassOptions::new();
        Ok(Self {
            clip,
            options: match socket {
                Some(socket) => options.socket(socket),
                None => options,
            },
            snapshots: Snapshots::new(SnapshotOptions {
                mode: SnapshotMode::Auto,
                // A clip's own size counts, and what memory there is.
                copy_budget: u64::MAX,
            }),
            copy: copy.transpose().map_err(|error| BenchError::Io {
                path: clip.into(),
                error,
            })?,
            #[cfg(feature = "mount")]
            remounts: mounting
                .map(|&engine| Ok((engine, Remount::of(clip, engine)?)))
                .collect::<Result<_, BenchError>>()?,
        })
    }

    #[cfg(feature = "mount")]
    fn remount(&self, engine: Engine) -> Option<&Remount> {
        let found = self.remounts.iter().find(|(of, _)| *of == engine);
        found.map(|(_, remount)| remount)
    }

    /// Bytes that a mount has read through FUSE.
    #[cfg_attr(not(feature = "mount"), allow(unused, clippy::unused_self))]
    pub(super) fn fuse_bytes(&self, engine: Engine) -> u64 {
        #[cfg(feature = "mount")]
        return self.remount(engine).map_or(0, Remount::fuse_bytes);
        #[cfg(not(feature = "mount"))]
        0
    }

    /// A file besides the clip and its cache file whose pages an engine reads.
    pub(super) fn other_file(&self, engine: Engine) -> Option<&Path> {
        match engine {
            Engine::Copy => self.copy.as_ref().map(NamedTempFile::path),
            #[cfg(feature = "mount")]
            Engine::MountRanges => self.remount(engine).map(Remount::clip),
            _ => None,
        }
    }

    /// Opens the clip as a program would that is to read it this way.
    pub(super) fn open_by(&self, engine: Engine) -> Result<Opened, BenchError> {
        let clip = self.clip;
        let plain = |path: &Path| File::open(path).map(Opened::Plain).map_err(|e| self.io(e));
        match engine {
            Engine::Bypass => Ok(Opened::Bypass(self.prove(&self.options)?)),
            Engine::Handover => {
                let options = self.options.clone().socket_alone();
                Ok(Opened::Bypass(self.prove(&options)?))
            }
            Engine::Bufread => Ok(Opened::Lent {
                file: self.prove(&self.options)?,
                used: 0,
            }),
            Engine::Mmap => self.map(),
            Engine::Raw => plain(&self.raw_path()?),
            Engine::Copy => plain(self.copy.as_ref().map_or(clip, NamedTempFile::path)),
            Engine::Fuse => plain(clip),
            #[cfg(feature = "mount")]
            Engine::Mount | Engine::MountRanges => {
                plain(self.remount(engine).map_or(clip, Remount::clip))
            }
        }
    }

    fn prove(&self, options: &BypassOptions) -> Result<Box<BypassFile>, BenchError> {
        let file = options.open_to_measure(self.clip);
        file.map(Box::new).map_err(|e| self.io(e))
    }

    fn map(&self) -> Result<Opened, BenchError> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let clip = rustix::fs::open(self.clip, flags, Mode::empty());
        let clip = clip.map_err(|e| self.io(e.into()))?;
        let whole = self.snapshots.open(clip.as_fd());
        let map = whole.and_then(|whole| whole.map());
        let map = map.map_err(|refusal| BenchError::Engine {
            path: self.clip.into(),
            engine: Engine::Mmap.name(),
            why: refusal.to_string(),
        })?;
        Ok(Opened::Mapped { map, position: 0 })
    }

    /// Where the clip's cache file is, if it is proven.
    pub(super) fn raw_path(&self) -> Result<PathBuf, BenchError> {
        let file = BypassOptions::new().open_to_measure(self.clip);
        let file = file.map_err(|e| self.io(e))?;
        if let Some(refusal) = file.refusal() {
            return Err(BenchError::NotBypassed {
                path: self.clip.into(),
                refusal,
            });
        }
        Ok(file.cache_path().unwrap_or_default())
    }

    fn io(&self, error: io::Error) -> BenchError {
        BenchError::Io {
            path: self.clip.into(),
            error,
        }
    }
}

/// Where temporary files are: on a disk, in most cases, as the cache is.
fn copy_of(clip: &Path) -> io::Result<NamedTempFile> {
    let mut copy = tempfile::Builder::new()
        .prefix("vmafx-bypass-")
        .tempfile()?;
    io::copy(&mut File::open(clip)?, &mut copy)?;
    copy.as_file().sync_all()?;
    Ok(copy)
}

impl Opened {
    /// The next bytes, as many as `block` has room for or fewer: in it, or lent.
    pub(super) fn next<'a>(&'a mut self, block: &'a mut [u8]) -> io::Result<&'a [u8]> {
        match self {
            Self::Plain(file) => {
                let n = file.read(block)?;
                Ok(&block[..n])
            }
            Self::Bypass(file) => {
                let n = file.read(block)?;
                Ok(&block[..n])
            }
            Self::Lent { file, used } => {
                file.consume(*used);
                let bytes = file.fill_buf()?;
                *used = bytes.len().min(block.len());
                Ok(&bytes[..*used])
            }
            Self::Mapped { map, position } => {
                let start = *position;
                *position = map.len().min(start + block.len());
                Ok(&map[start..*position])
            }
        }
    }

    /// The bytes at an offset, likewise.
    pub(super) fn at<'a>(&'a self, block: &'a mut [u8], offset: u64) -> io::Result<&'a [u8]> {
        let n = match self {
            Self::Plain(file) => file.read_at(block, offset)?,
            Self::Bypass(file) | Self::Lent { file, .. } => file.read_at(block, offset)?,
            Self::Mapped { map, .. } => {
                let start = map.len().min(offset as usize);
                return Ok(&map[start..map.len().min(start + block.len())]);
            }
        };
        Ok(&block[..n])
    }

    /// Bytes that the bypass read through FUSE.
    pub(super) fn fuse_bytes(&self) -> u64 {
        match self {
            Self::Plain(_) | Self::Mapped { .. } => 0,
            Self::Bypass(file) | Self::Lent { file, .. } => file.stats().fuse_bytes(),
        }
    }
}
