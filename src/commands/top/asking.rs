//! `explain`, asked by a process of its own: FUSE may never answer, and a thread
//! that waits for it would keep this process from its end.

use std::io::{self, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

/// An `explain` under way; dropped, it is ended.
#[derive(Debug)]
pub struct Asking(Arc<Mutex<Child>>);

impl Asking {
    /// Asks about a clip, and tells what was said.
    pub fn start(path: &Path, tell: impl FnOnce(String) + Send + 'static) -> io::Result<Self> {
        let (mut said, says) = io::pipe()?;
        // This very program, though its file may have been replaced.
        let child = Command::new("/proc/self/exe")
            .args(["explain", "--"])
            .arg(path)
            .stdin(Stdio::null())
            .stdout(says.try_clone()?)
            .stderr(says)
            .spawn()?;
        let child = Arc::new(Mutex::new(child));
        let asking = Self(Arc::clone(&child));
        std::thread::Builder::new()
            .name("vmafx-top-ask".into())
            .spawn(move || {
                let mut bytes = Vec::new();
                let failed = said.read_to_end(&mut bytes).err();
                let mut text = String::from_utf8_lossy(&bytes).into_owned();
                if let Some(error) = failed {
                    text.push_str(&error.to_string());
                }
                tell(text);
                // Only its status is left; nobody waits for this thread.
                let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
                let _ = child.wait();
            })?;
        Ok(asking)
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        // Held: it has said all, and ends.
        if let Ok(mut child) = self.0.try_lock() {
            let _ = child.kill();
        }
    }
}
