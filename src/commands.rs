//! The subcommands.

pub mod bench;
pub mod dump_map;
mod estimate;
pub mod read;
pub mod run;
