//! Names the shared library by its ABI, so that programs find the one that they
//! were linked with.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // `VMAFX_ABI_VERSION` of src/abi.rs; tests/header.rs compares them.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libvmafx_bypass.so.1");
}
