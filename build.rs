//! Compiles the BPF programs and writes their skeleton into OUT_DIR; tells the
//! revision.

#[cfg(feature = "ebpf")]
#[path = "build/clang.rs"]
mod clang;
#[path = "build/revision.rs"]
mod revision;

use std::env;
use std::path::PathBuf;

/// Names the revision where there is no git, or it shall have another name.
const REVISION: &str = "VMAFX_BYPASS_REVISION";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=build");
    name_revision();
    #[cfg(feature = "ebpf")]
    bpf::build();
}

fn name_revision() {
    println!("cargo:rerun-if-env-changed={REVISION}");
    let given = env::var(REVISION).ok().filter(|name| !name.is_empty());
    let name = given.unwrap_or_else(|| {
        let root = env::var_os("CARGO_MANIFEST_DIR").map_or_else(PathBuf::new, PathBuf::from);
        let revision = revision::of(&root, env::var("PROFILE").is_ok_and(|p| p == "release"));
        for path in revision.watched {
            println!("cargo:rerun-if-changed={}", path.display());
        }
        revision.name
    });
    println!("cargo:rustc-env={REVISION}={name}");
}

#[cfg(feature = "ebpf")]
mod bpf {
    use std::env;
    use std::ffi::OsStr;
    use std::path::PathBuf;

    use libbpf_cargo::SkeletonBuilder;

    use super::clang::{FLAGS, SOURCE};

    const FOLDER: &str = "src/bpf";

    pub fn build() {
        let variable =
            |name: &str| env::var_os(name).unwrap_or_else(|| panic!("cargo did not set {name}"));
        let vmlinux = PathBuf::from(variable("CARGO_MANIFEST_DIR"))
            .join("vmlinux")
            .join(variable("CARGO_CFG_TARGET_ARCH"));
        assert!(
            vmlinux.join("vmlinux.h").exists(),
            "no {}/vmlinux.h: this architecture is not supported yet; see scripts/vmlinux.sh",
            vmlinux.display()
        );
        let skeleton = PathBuf::from(variable("OUT_DIR")).join("rclone_bypass.skel.rs");
        SkeletonBuilder::new()
            .source(SOURCE)
            .clang_args(
                [OsStr::new("-I"), vmlinux.as_os_str()]
                    .into_iter()
                    .chain(FLAGS.map(OsStr::new)),
            )
            .build_and_generate(&skeleton)
            .unwrap_or_else(|error| {
                panic!(
                    "`{SOURCE}` did not compile: {error:#}; install clang, or build with \
                     --no-default-features"
                )
            });
        println!("cargo:rerun-if-changed={FOLDER}");
        println!("cargo:rerun-if-changed={}", vmlinux.display());
    }
}
