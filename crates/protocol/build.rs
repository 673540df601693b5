//! Compiles the protos in pure Rust, so that nobody has to install protoc, and
//! keeps the whole descriptors with their comments for reflection.

use std::error::Error;
use std::path::PathBuf;

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from("../../proto");
    println!("cargo::rerun-if-changed={}", root.display());
    let mut compiler = protox::Compiler::new([&root])?;
    compiler
        .include_source_info(true)
        .include_imports(true)
        .open_files([
            "inference/grpc_service.proto",
            "tei/v1/tei.proto",
            "andon/v1/report.proto",
        ])?;
    let descriptors = compiler.file_descriptor_set();
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    let mut config = tonic_prost_build::Config::new();
    // Tensor bytes are slices of the received message, never copies of it.
    config.bytes([
        ".inference.ModelInferRequest.raw_input_contents",
        ".inference.ModelInferResponse.raw_output_contents",
        ".inference.InferTensorContents.bytes_contents",
    ]);
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds_with_config(descriptors, config)?;
    Ok(())
}
