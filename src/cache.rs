//! What is in a cache, and the proof that it may be read instead of FUSE.
//!
//! [`proof`] decides: it is pure and takes gathered facts. [`rclone`] gathers
//! them for rclone's VFS disk cache. Another cache would be another folder
//! beside it. [`trail`] tells which gates a clip has passed.

pub mod pieces;
pub mod proof;
pub mod ranges;
pub mod rclone;
pub mod trail;
