//! Nothing may hang: a process that takes too long is killed, and whoever
//! waits for it then sees that it ended.

use std::sync::mpsc::{self, RecvTimeoutError, Sender};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::PATIENCE;

/// Kills a process that was fed and neither fed again nor let rest.
pub struct Watchdog(Sender<bool>);

impl Watchdog {
    pub fn new(pid: u32) -> Self {
        let (sender, hungry) = mpsc::channel();
        std::thread::spawn(move || {
            // Whether it is to be waited for; an end of the channel ends this.
            while let Ok(mut fed) = hungry.recv() {
                while fed {
                    fed = match hungry.recv_timeout(PATIENCE) {
                        Ok(fed) => fed,
                        Err(RecvTimeoutError::Timeout) => {
                            eprintln!("pid {pid} hangs: it is killed");
                            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
                            return;
                        }
                        Err(RecvTimeoutError::Disconnected) => return,
                    };
                }
            }
        });
        Self(sender)
    }

    /// From now on an answer is expected.
    pub fn feed(&self) {
        let _ = self.0.send(true);
    }

    /// The answer has come.
    pub fn rest(&self) {
        let _ = self.0.send(false);
    }
}
