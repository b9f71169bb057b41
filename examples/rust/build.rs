//! Where the library lies that the crate compiled goes into the program.
fn main() {
    if let Ok(folder) = std::env::var("DEP_KERNELGEN_FOLDER") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
    }
}
