//! The engines: a clip, opened each way.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

#[cfg(feature = "mount")]
use super::remount::Remount;
use super::{BenchError, Engine};
use crate::{BypassFile, BypassOptions};

/// An open clip.
pub(super) enum Opened {
    Plain(File),
    Bypass(Box<BypassFile>),
}

/// How an engine that asks a server does.
pub(super) fn options(socket: Option<&Path>) -> BypassOptions {
    let options = BypassOptions::new();
    match socket {
        Some(socket) => options.socket(socket),
        None => options,
    }
}

/// What engines need that mount: kept while a clip is measured.
pub(super) struct Ways {
    #[cfg(feature = "mount")]
    remounts: Vec<(Engine, Remount)>,
}

#[cfg(feature = "mount")]
impl Ways {
    pub(super) fn open(clip: &Path, engines: &[Engine]) -> Result<Self, BenchError> {
        let mounting = engines
            .iter()
            .filter(|engine| matches!(engine, Engine::Mount | Engine::MountRanges));
        let remounts = mounting.map(|&engine| Ok((engine, Remount::of(clip, engine)?)));
        Ok(Self {
            remounts: remounts.collect::<Result<_, BenchError>>()?,
        })
    }

    fn find(&self, engine: Engine) -> Option<&Remount> {
        let found = self.remounts.iter().find(|(of, _)| *of == engine);
        found.map(|(_, remount)| remount)
    }

    /// Bytes that a mount has read through FUSE.
    pub(super) fn fuse_bytes(&self, engine: Engine) -> u64 {
        self.find(engine).map_or(0, Remount::fuse_bytes)
    }

    /// Where an engine finds the clip.
    fn path<'a>(&'a self, engine: Engine, clip: &'a Path) -> &'a Path {
        self.find(engine).map_or(clip, Remount::clip)
    }
}

#[cfg(not(feature = "mount"))]
impl Ways {
    // As with the feature, where it may fail.
    #[allow(clippy::unnecessary_wraps)]
    pub(super) fn open(_clip: &Path, _engines: &[Engine]) -> Result<Self, BenchError> {
        Ok(Self {})
    }

    // As with the feature.
    #[allow(clippy::unused_self)]
    pub(super) fn fuse_bytes(&self, _engine: Engine) -> u64 {
        0
    }
}

impl Opened {
    pub(super) fn open(
        engine: Engine,
        clip: &Path,
        #[cfg_attr(not(feature = "mount"), allow(unused))] ways: &Ways,
        options: &BypassOptions,
    ) -> Result<Self, BenchError> {
        let io = |error| BenchError::Io {
            path: clip.into(),
            error,
        };
        match engine {
            Engine::Bypass | Engine::Handover => {
                let options = match engine {
                    Engine::Handover => options.clone().socket_alone(),
                    _ => options.clone(),
                };
                let file = options.open_to_measure(clip).map_err(io)?;
                Ok(Self::Bypass(Box::new(file)))
            }
            Engine::Raw => File::open(Self::raw_path(clip)?)
                .map(Self::Plain)
                .map_err(io),
            Engine::Fuse => File::open(clip).map(Self::Plain).map_err(io),
            #[cfg(feature = "mount")]
            Engine::Mount | Engine::MountRanges => {
                let clip = ways.path(engine, clip);
                File::open(clip).map(Self::Plain).map_err(io)
            }
        }
    }

    /// Where a clip's cache file is, if it is proven.
    pub(super) fn raw_path(clip: &Path) -> Result<PathBuf, BenchError> {
        let file = BypassOptions::new()
            .open_to_measure(clip)
            .map_err(|error| BenchError::Io {
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

    pub(super) fn read(&mut self, block: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(file) => file.read(block),
            Self::Bypass(file) => file.read(block),
        }
    }

    pub(super) fn read_at(&self, block: &mut [u8], offset: u64) -> io::Result<usize> {
        match self {
            Self::Plain(file) => file.read_at(block, offset),
            Self::Bypass(file) => file.read_at(block, offset),
        }
    }

    /// Bytes that the bypass read through FUSE.
    pub(super) fn fuse_bytes(&self) -> u64 {
        match self {
            Self::Plain(_) => 0,
            Self::Bypass(file) => file.stats().fuse_bytes(),
        }
    }
}
