//! The C interface of `vmafx-bypass`: `libvmafx_bypass.so` and `.a`, with
//! `include/vmafx_bypass.h`. How to use it: `docs/LIBRARY.md`.
//!
//! [`abi`] is what C sees, and the only home of `unsafe`.

pub mod abi;
mod failure;
