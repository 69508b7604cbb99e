//! A disk that takes its time, in a process of its own: every read is delayed.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::Read;

use common::clips::*;

/// What is read ahead is old by the time that it is there.
#[test]
fn a_slow_disk_does_not_end_a_file() {
    each_rclone(MIB, &[], |rig, bytes| {
        let mut file = open_cached(rig);
        let slow = Slow::start(std::process::id(), "pread64:delay_exit=50ms");
        let mut read = Vec::new();
        let mut buffer = [0; 4096];
        while read.len() < 20 * buffer.len() {
            let n = file.read(&mut buffer).unwrap();
            assert!(n > 0, "end at {}: {:?}", read.len(), file.stats());
            read.extend_from_slice(&buffer[..n]);
        }
        drop(slow);
        assert!(read == bytes[..read.len()]);
        assert_eq!(file.stats().fuse_bytes(), 0);
    });
}
