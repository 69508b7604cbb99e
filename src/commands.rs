//! The subcommands.

#[cfg(feature = "ebpf")]
mod account;
pub mod bench;
#[cfg(feature = "ebpf")]
mod confine;
pub mod doctor;
pub mod dump_map;
#[cfg(feature = "ebpf")]
mod estimate;
pub mod exec;
pub mod explain;
pub mod generate;
#[cfg(all(feature = "metrics", any(feature = "ebpf", feature = "mount")))]
mod metrics;
#[cfg(feature = "mount")]
pub mod mount;
#[cfg(feature = "ebpf")]
mod notify;
pub mod read;
pub mod run;
#[cfg(feature = "ebpf")]
mod serve;
#[cfg(feature = "top")]
pub mod top;
pub mod warm;
