//! Compiles the library with build.sh, or takes the one in the folder KERNELGEN_LIB_DIR.
//!
//! Programs find it at run time by a path in themselves, which their own build script has to give:
//! println!("cargo:rustc-link-arg=-Wl,-rpath,{}", std::env::var("DEP_KERNELGEN_FOLDER").unwrap());
use std::{env, path::Path, process::Command};

fn main() {
    println!("cargo:rerun-if-env-changed=KERNELGEN_LIB_DIR");
    println!("cargo:rerun-if-changed=../src");
    let folder = env::var("KERNELGEN_LIB_DIR").unwrap_or_else(|_| {
        let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
        let library = Path::new(&out).join("libkernelgen.so");
        let done = Command::new("sh").arg("../build.sh").arg(&library).status();
        assert!(done.is_ok_and(|status| status.success()), "../build.sh failed");
        out
    });
    println!("cargo:rustc-link-search=native={folder}");
    println!("cargo:rustc-link-lib=dylib=kernelgen");
    println!("cargo:folder={folder}");
}
