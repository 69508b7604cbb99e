//! The engines: a clip, opened each way.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{BenchError, Engine};
use crate::{BypassFile, BypassOptions};

/// An open clip.
pub(super) enum Opened {
    Plain(File),
    Bypass(Box<BypassFile>),
}

impl Opened {
    pub(super) fn open(
        engine: Engine,
        clip: &Path,
        options: &BypassOptions,
    ) -> Result<Self, BenchError> {
        let io = |error| BenchError::Io {
            path: clip.into(),
            error,
        };
        match engine {
            Engine::Fuse => File::open(clip).map(Self::Plain).map_err(io),
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
