//! Whatever rclone, its users and the kernel do to the cache: a bypassed read
//! returns what FUSE would have returned. See docs/TESTING.md.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../common/mod.rs"]
mod common;

mod cells;
mod judge;
#[cfg(test)]
mod judge_tests;
