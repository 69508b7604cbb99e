//! The header is what the code says. `make header` writes it.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs;
use std::path::Path;

const HEADER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/include/vmafx_bypass.h");

/// What cbindgen makes of the functions. Rustdoc's headings are no good in C.
fn generated() -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(folder.join("cbindgen.toml")).unwrap();
    let bindings = cbindgen::Builder::new()
        .with_config(config)
        .with_src(folder.join("src/abi.rs"))
        .generate()
        .unwrap();
    let mut text = Vec::new();
    bindings.write(&mut text);
    let text = String::from_utf8(text).unwrap();
    text.replace(" * # Safety\n * ", " * Undefined unless ")
}

fn header() -> String {
    fs::read_to_string(HEADER).unwrap()
}

#[test]
fn the_header_is_the_codes() {
    let generated = generated();
    if std::env::var_os("WRITE_HEADER").is_some() {
        fs::write(HEADER, &generated).unwrap();
    }
    assert!(header() == generated, "stale: run `make header`");
}

/// Every function, by its declaration.
fn functions(header: &str) -> Vec<&str> {
    let ends = header.match_indices('(').map(|(at, _)| &header[..at]);
    let mut names: Vec<_> = ends
        .map(|text| text.rsplit([' ', '*', '(', '\n']).next().unwrap())
        .filter(|name| name.starts_with("vmafx_"))
        .collect();
    names.sort_unstable();
    names.dedup();
    names
}

#[test]
fn every_function_is_in_the_documentation() {
    let header = header();
    let functions = functions(&header);
    assert!(functions.len() >= 19, "{functions:?}");
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/LIBRARY.md"));
    let text = text.unwrap();
    for name in functions {
        assert!(text.contains(&format!("`{name}`")), "{name}");
    }
}

#[test]
fn the_soname_is_of_the_abis_version() {
    let version = header();
    let version = version.split("#define VMAFX_ABI_VERSION ").nth(1).unwrap();
    let soname = format!("libvmafx_bypass.so.{}\"", version.lines().next().unwrap());
    assert!(include_str!("../build.rs").contains(&soname), "{soname}");
}
