//! How the BPF programs are compiled, besides what libbpf-cargo does itself.

/// Relative to the package's folder.
pub const SOURCE: &str = "src/bpf/rclone_bypass.bpf.c";

pub const FLAGS: [&str; 3] = [
    // The newest instruction set that every supported kernel knows, named because
    // clang's own default has changed before.
    "-mcpu=v3", "-Wall", "-Werror",
];
