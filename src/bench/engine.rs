//! The engines: a clip, opened each way.

use std::fs::File;
use std::io::{self, BufRead, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use tempfile::NamedTempFile;

use super::child::Child;
#[cfg(feature = "mount")]
use super::remount::Remount;
use super::uring::Uring;
use super::{BenchError, Engine, Plan, Tuned};
use crate::aligned::AlignedBuffer;
use crate::snapshot::{Mapped, SnapshotMode, SnapshotOptions, Snapshots};
use crate::{BypassFile, BypassOptions};

/// statfs(2)'s type of file systems in memory.
const TMPFS: i64 = 0x0102_1994;

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
    Uring(Box<Uring>),
}

/// What engines need that is made before and kept while a clip is measured.
pub(super) struct Ways<'a> {
    clip: &'a Path,
    /// Which handover server is asked.
    options: BypassOptions,
    tuned: Option<&'a Tuned>,
    program: Option<&'a Path>,
    cold: bool,
    snapshots: Snapshots,
    copy: Option<NamedTempFile>,
    children: Vec<(Engine, Child)>,
    #[cfg(feature = "mount")]
    remounts: Vec<(Engine, Remount)>,
}

impl<'a> Ways<'a> {
    pub(super) fn new(clip: &'a Path, plan: &'a Plan) -> Self {
        let options = BypassOptions::new();
        Self {
            clip,
            options: match &plan.socket {
                Some(socket) => options.socket(socket),
                None => options,
            },
            tuned: plan.tuned.as_ref(),
            program: plan.program.as_deref(),
            cold: plan.cold,
            snapshots: Snapshots::of_huge_pages(SnapshotOptions {
                mode: SnapshotMode::Auto,
                // A clip's own size counts, and what memory there is.
                copy_budget: u64::MAX,
            }),
            copy: None,
            children: Vec::new(),
            #[cfg(feature = "mount")]
            remounts: Vec::new(),
        }
    }

    /// Makes what an engine needs.
    ///
    /// # Errors
    /// [`BenchError::Engine`] and [`BenchError::NotBypassed`] where it cannot run.
    pub(super) fn prepare(&mut self, engine: Engine) -> Result<(), BenchError> {
        if self.cold && !engine.can_be_cold() {
            return Err(self.cannot(engine, "what it reads is in memory, never cold".into()));
        }
        match engine {
            Engine::Copy => {
                let copy = copy_of(self.clip).map_err(|e| self.io(e))?;
                let place = rustix::fs::fstatfs(&copy).map_err(|e| self.io(e.into()))?;
                if self.cold && place.f_type as i64 == TMPFS {
                    let why = "temporary files are in memory, never cold";
                    return Err(self.cannot(engine, why.into()));
                }
                self.copy = Some(copy);
            }
            Engine::Exec | Engine::Preload => {
                let child = self.child_for(engine)?;
                self.children.push((engine, child));
            }
            #[cfg(feature = "mount")]
            Engine::Mount | Engine::MountRanges => {
                self.remounts
                    .push((engine, Remount::of(self.clip, engine)?));
            }
            Engine::Handover => {
                let options = self.options.clone().socket_alone();
                if let Some(refusal) = self.prove(&options)?.refusal() {
                    return Err(self.cannot(engine, refusal.to_string()));
                }
            }
            Engine::FuseTuned | Engine::Mmap | Engine::Raw | Engine::IoUring => {
                drop(self.open_by(engine, 1, self.raw_of(engine)?.as_deref())?);
            }
            Engine::Fuse | Engine::Bypass | Engine::Bufread => {}
        }
        Ok(())
    }

    fn child_for(&self, engine: Engine) -> Result<Child, BenchError> {
        let Some(program) = self.program else {
            return Err(self.cannot(engine, "it needs the program".into()));
        };
        match engine {
            Engine::Exec => Ok(Child::under_exec(program, self.clip)),
            _ => Child::preloaded(program, self.clip, &self.raw_path()?),
        }
    }

    /// The program that reads, if one does.
    pub(super) fn child(&self, engine: Engine) -> Option<&Child> {
        let found = self.children.iter().find(|(of, _)| *of == engine);
        found.map(|(_, child)| child)
    }

    fn cannot(&self, engine: Engine, why: String) -> BenchError {
        BenchError::Engine {
            path: self.clip.into(),
            engine: engine.name(),
            why,
        }
    }

    /// The clip at its other place.
    fn tuned_clip(&self) -> Result<PathBuf, BenchError> {
        let why = match self.tuned {
            None => "no other mount of the remote is named: --tuned names one".into(),
            Some(tuned) => match self.clip.strip_prefix(&tuned.prefix) {
                Ok(inside) => return Ok(tuned.folder.join(inside)),
                Err(_) => format!("the clip is not below `{}`", tuned.prefix.display()),
            },
        };
        Err(self.cannot(Engine::FuseTuned, why))
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

    /// Files besides the clip and its cache file whose pages an engine reads.
    pub(super) fn other_files(&self, engine: Engine) -> Vec<PathBuf> {
        match engine {
            Engine::Copy => self.copy.iter().map(|copy| copy.path().into()).collect(),
            Engine::FuseTuned => {
                let clip = self.tuned_clip().ok();
                let cache = clip.as_ref().and_then(|clip| raw_path_of(clip).ok());
                clip.into_iter().chain(cache).collect()
            }
            #[cfg(feature = "mount")]
            Engine::MountRanges => {
                let mount = self.remount(engine).into_iter();
                mount.map(|mount| mount.clip().into()).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Opens the clip as a program would that is to read it this way, in blocks of so
    /// many bytes; `raw`: what [`raw_of`](Self::raw_of) has told.
    pub(super) fn open_by(
        &self,
        engine: Engine,
        block_size: usize,
        raw: Option<&Path>,
    ) -> Result<Opened, BenchError> {
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
            Engine::Raw => plain(raw.unwrap_or(clip)),
            Engine::Copy => plain(self.copy.as_ref().map_or(clip, NamedTempFile::path)),
            Engine::Fuse => plain(clip),
            Engine::FuseTuned => plain(&self.tuned_clip()?),
            Engine::IoUring => self.ring(raw.unwrap_or(clip), block_size),
            // A program of its own opens it.
            Engine::Exec | Engine::Preload => plain(clip),
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

    fn ring(&self, raw: &Path, block_size: usize) -> Result<Opened, BenchError> {
        let file = File::open(raw).map_err(|e| self.io(e))?;
        let ring = Uring::open(file, block_size);
        let ring = ring.map_err(|e| self.cannot(Engine::IoUring, format!("io_uring: {e}")))?;
        Ok(Opened::Uring(Box::new(ring)))
    }

    fn map(&self) -> Result<Opened, BenchError> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let clip = rustix::fs::open(self.clip, flags, Mode::empty());
        let clip = clip.map_err(|e| self.io(e.into()))?;
        let whole = self.snapshots.open(clip.as_fd());
        let map = whole.and_then(|whole| whole.map());
        let map = map.map_err(|refusal| self.cannot(Engine::Mmap, refusal.to_string()))?;
        Ok(Opened::Mapped { map, position: 0 })
    }

    /// Where the clip's cache file is, if it is proven.
    pub(super) fn raw_path(&self) -> Result<PathBuf, BenchError> {
        raw_path_of(self.clip)
    }

    /// The same, for engines that read it without a proof: which is not theirs to pay.
    pub(super) fn raw_of(&self, engine: Engine) -> Result<Option<PathBuf>, BenchError> {
        let is_raw = matches!(engine, Engine::Raw | Engine::IoUring);
        is_raw.then(|| self.raw_path()).transpose()
    }

    fn io(&self, error: io::Error) -> BenchError {
        BenchError::Io {
            path: self.clip.into(),
            error,
        }
    }
}

fn raw_path_of(clip: &Path) -> Result<PathBuf, BenchError> {
    let file = BypassOptions::new().open_to_measure(clip);
    let file = file.map_err(|error| BenchError::Io {
        path: clip.into(),
        error,
    })?;
    if let Some(refusal) = file.refusal() {
        return Err(BenchError::NotBypassed {
            path: clip.into(),
            refusal,
        });
    }
    Ok(file.cache_path().unwrap_or_default())
}

/// Where temporary files are: on a disk, in most cases, as the cache is.
fn copy_of(clip: &Path) -> io::Result<NamedTempFile> {
    let mut copy = tempfile::Builder::new()
        .prefix("vmafx-bypass-")
        .tempfile()?;
    // Not by `io::copy`, whose sendfile(2) writes page by page: the file then has
    // small pages in memory, which are read at half the speed of large ones.
    let mut clip = File::open(clip)?;
    let mut block = AlignedBuffer::new(1 << 20);
    loop {
        let n = clip.read(&mut block)?;
        if n == 0 {
            break;
        }
        copy.write_all(&block[..n])?;
    }
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
            Self::Uring(ring) => ring.next(),
        }
    }

    /// The bytes at an offset, likewise.
    pub(super) fn at<'a>(&'a mut self, block: &'a mut [u8], offset: u64) -> io::Result<&'a [u8]> {
        let n = match self {
            Self::Plain(file) => file.read_at(block, offset)?,
            Self::Bypass(file) | Self::Lent { file, .. } => file.read_at(block, offset)?,
            Self::Mapped { map, .. } => {
                let start = map.len().min(offset as usize);
                return Ok(&map[start..map.len().min(start + block.len())]);
            }
            Self::Uring(ring) => return ring.at(offset),
        };
        Ok(&block[..n])
    }

    /// Bytes that the bypass read through FUSE.
    pub(super) fn fuse_bytes(&self) -> u64 {
        match self {
            Self::Plain(_) | Self::Mapped { .. } | Self::Uring(_) => 0,
            Self::Bypass(file) | Self::Lent { file, .. } => file.stats().fuse_bytes(),
        }
    }
}
