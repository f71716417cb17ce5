//! Turns the Cap'n Proto schemas into Rust at each build.

fn main() {
    println!("cargo:rerun-if-changed=data.capnp");
    println!("cargo:rerun-if-changed=control.capnp");
    println!("cargo:rerun-if-changed=metadata.capnp");
    capnpc::CompilerCommand::new()
        .file("data.capnp")
        .file("control.capnp")
        .file("metadata.capnp")
        .run()
        .expect("capnp compiles the schemas (Debian packages capnproto and libcapnp-dev; `make setup` installs them)");
}
