//! Where a command's data goes: standard output, or a file that is whole or
//! not there.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use nix::fcntl::{FcntlArg, fcntl};
use tempfile::NamedTempFile;

/// Bytes of a pipe: the default of /proc/sys/fs/pipe-max-size.
const PIPE: i32 = 1 << 20;

/// Where the bytes go.
pub enum Sink {
    /// Standard output, or a device or pipe.
    Stream { file: File, name: String },
    /// A temporary file that becomes the target when it is whole, and is
    /// removed when it does not.
    Whole {
        file: NamedTempFile,
        target: PathBuf,
    },
}

impl Sink {
    /// Opens `-`, a file to be made or replaced, or a device or pipe.
    pub fn open(output: &Path) -> Result<Self> {
        if output == Path::new("-") {
            return Ok(Self::stream(
                raw_stdout().context("standard output")?,
                "standard output".into(),
            ));
        }
        let name = format!("`{}`", output.display());
        // A symlink stays one: what it leads to is replaced.
        let target = fs::canonicalize(output).unwrap_or_else(|_| output.to_path_buf());
        match fs::metadata(&target) {
            Ok(found) if found.is_dir() => return Err(anyhow!("{name} is a folder")),
            Ok(found) if !found.is_file() => {
                let file = OpenOptions::new()
                    .write(true)
                    .open(&target)
                    .with_context(|| name.clone())?;
                return Ok(Self::stream(file, name));
            }
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).context(name),
        }
        let folder = match target.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let file = tempfile::Builder::new()
            .prefix(".vmafx-bypass-")
            // The umask applies.
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(folder)
            .with_context(|| format!("a temporary file beside {name}"))?;
        Ok(Self::Whole { file, target })
    }

    /// A pipe is made as large as anyone may make one: through one of 64 KiB, the
    /// default, 100 MiB take 250 ms, through one of 1 MiB 54.
    fn stream(file: File, name: String) -> Self {
        // Refused of other files, and where the user has too many large ones.
        if fcntl(&file, FcntlArg::F_GETPIPE_SZ).is_ok_and(|size| size < PIPE) {
            let _ = fcntl(&file, FcntlArg::F_SETPIPE_SZ(PIPE));
        }
        Self::Stream { file, name }
    }

    /// Adds bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Stream { file, name } => file.write_all(bytes).context(name.clone()),
            Self::Whole { file, target } => file
                .write_all(bytes)
                .with_context(|| format!("writing `{}`", target.display())),
        }
    }

    /// Puts a whole file where it belongs.
    pub fn finish(self) -> Result<()> {
        match self {
            Self::Stream { .. } => Ok(()),
            Self::Whole { file, target } => file
                .persist(&target)
                .map(drop)
                .map_err(|e| e.error)
                .with_context(|| format!("`{}`", target.display())),
        }
    }
}

/// Standard output without std's line buffering, for bytes.
fn raw_stdout() -> io::Result<File> {
    Ok(File::from(io::stdout().as_fd().try_clone_to_owned()?))
}
