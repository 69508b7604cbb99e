//! How a file is opened, where the defaults are not wanted.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::BypassFile;
use super::companion::Companion;
use super::explain::Explanation;
use super::remote::Via;

/// How to open a [`BypassFile`].
///
/// ```no_run
/// use vmafx_bypass::BypassOptions;
///
/// # fn main() -> std::io::Result<()> {
/// let options = BypassOptions::new().socket("/run/vmafx-bypass.sock");
/// let clip = options.open("/rclone-mount/clip.y4m")?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct BypassOptions {
    via: Via,
}

impl Default for BypassOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl BypassOptions {
    /// The defaults: where the cache may not be opened, the handover server that
    /// `VMAFX_BYPASS_SOCKET` names is asked, if it names one.
    #[must_use]
    pub fn new() -> Self {
        Self {
            via: Via::from_env(),
        }
    }

    /// Asks the handover server at this socket, and not the environment's.
    #[must_use]
    pub fn socket(mut self, path: impl Into<PathBuf>) -> Self {
        self.via.socket = Some(path.into());
        self
    }

    /// Asks the server even where the cache may be opened: to measure and to
    /// test.
    #[must_use]
    pub fn socket_alone(mut self) -> Self {
        self.via.alone = true;
        self
    }

    /// As [`BypassFile::open`].
    ///
    /// # Errors
    /// Those of open(2) on the path itself.
    pub fn open(&self, path: impl AsRef<Path>) -> io::Result<BypassFile> {
        let companion = Companion::open(path.as_ref())?;
        Ok(BypassFile::new(companion, self.via.clone()))
    }

    /// As [`BypassFile::from_fd`].
    ///
    /// # Errors
    /// Where the descriptor is not of a regular file that is open for reading.
    pub fn from_fd(&self, fd: OwnedFd) -> io::Result<BypassFile> {
        let companion = Companion::from_fd(fd)?;
        Ok(BypassFile::new(companion, self.via.clone()))
    }

    /// Explains a file, as a read that began now with these options would find it.
    ///
    /// It opens the file through FUSE and, where something of it is cached,
    /// reads one byte there, as every proof does, by a server, too; rclone then
    /// keeps the clip as recently used. It changes nothing else.
    ///
    /// # Errors
    /// Those of open(2) on the path itself.
    pub fn explain(&self, path: impl AsRef<Path>) -> io::Result<Explanation> {
        Explanation::by(&self.via, path.as_ref())
    }

    /// As [`from_fd`](Self::from_fd), of a descriptor that nobody else has or has
    /// read through.
    #[cfg(feature = "mount")]
    pub(crate) fn take_new_fd(&self, fd: OwnedFd) -> io::Result<BypassFile> {
        let companion = Companion::from_new_fd(fd)?;
        Ok(BypassFile::new(companion, self.via.clone()))
    }

    /// As [`open`](Self::open), also where the opt-in switches every bypass
    /// off: for measuring what that costs.
    pub(crate) fn open_to_measure(&self, path: &Path) -> io::Result<BypassFile> {
        let companion = Companion::open(path)?;
        Ok(BypassFile::proven(companion, self.via.clone()))
    }
}
