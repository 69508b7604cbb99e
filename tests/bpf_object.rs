//! The BPF programs compile for every architecture with kernel types here.
#![cfg(feature = "ebpf")]
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../build/clang.rs"]
mod clang;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use libbpf_rs::ObjectBuilder;
use libbpf_rs::libbpf_sys::API_HEADERS;

/// Folders of `vmlinux`, and what libbpf's headers call them.
const ARCHITECTURES: [(&str, &str); 2] = [("x86_64", "x86"), ("aarch64", "arm64")];

/// The object for an architecture, as build.rs makes it.
fn compile(folder: &Path, vmlinux: &str, target: &str) -> PathBuf {
    let headers = folder.join("bpf");
    fs::create_dir_all(&headers).unwrap();
    for (name, text) in API_HEADERS {
        fs::write(headers.join(name), text).unwrap();
    }
    let object = folder.join("rclone_bypass.o");
    let output = Command::new("clang")
        .args(["-g", "-O2", "-target", "bpf", "-fno-stack-protector"])
        .args(clang::FLAGS)
        .arg(format!("-D__TARGET_ARCH_{target}"))
        .arg(format!("-Ivmlinux/{vmlinux}"))
        .arg("-I")
        .arg(folder)
        .args(["-c", clang::SOURCE, "-o"])
        .arg(&object)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{vmlinux}: {errors}");
    object
}

#[test]
fn every_architecture_has_the_same_programs_and_maps() {
    let dir = tempfile::tempdir().unwrap();
    let names = ARCHITECTURES.map(|(vmlinux, target)| {
        let path = compile(&dir.path().join(vmlinux), vmlinux, target);
        // libbpf parses types and relocations; it loads nothing.
        let object = ObjectBuilder::default().open_file(&path).unwrap();
        let sections = object
            .progs()
            .map(|p| p.section().to_string_lossy().into_owned());
        // Kernel functions are named after their architecture.
        let own = if target == "arm64" {
            &["__arm64_"][..]
        } else {
            &["__x64_", "__ia32_"]
        };
        for section in sections.filter(|name| name.starts_with("fe")) {
            let function = section.split('/').nth(1).unwrap();
            let known = own.iter().any(|prefix| function.starts_with(prefix));
            assert!(known || !function.starts_with("__"), "{vmlinux}: {section}");
        }
        let programs = object
            .progs()
            .map(|p| p.name().to_string_lossy().into_owned());
        let maps = object
            .maps()
            .map(|m| m.name().to_string_lossy().into_owned());
        // x86 has more ways in for 32-bit programs.
        let names = programs.chain(maps).filter(|name| !name.contains("_32_"));
        names.collect::<BTreeSet<_>>()
    });
    assert!(names[0].len() > 50, "{names:?}");
    assert_eq!(names[0], names[1]);
}

#[test]
fn every_folder_of_kernel_types_is_tried() {
    let folders = fs::read_dir("vmlinux").unwrap().flatten();
    let folders = folders.filter(|entry| entry.path().is_dir());
    let found: BTreeSet<_> = folders
        .map(|f| f.file_name().into_string().unwrap())
        .collect();
    assert_eq!(
        found,
        ARCHITECTURES.map(|(folder, _)| folder.to_owned()).into()
    );
}
