//! Compiles the protos in pure Rust, so that no build needs protoc,
//! keeps the whole descriptors with their comments for reflection, and makes
//! `Service` and `Method` from them.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::{self, Write as _};
use std::path::PathBuf;

use prost::Message;
use prost_types::FileDescriptorSet;

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
    std::fs::write(out.join("methods.rs"), methods_source(&descriptors)?)?;
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

/// Names that say too little without their package.
const RENAMED: [(&str, &str); 1] = [("Info", "TeiInfo")];

/// A service or method name as the variant of an enum.
fn variant(name: &str) -> &str {
    let short = name.strip_prefix("GRPC").unwrap_or(name);
    let short = short.strip_suffix("Service").unwrap_or(short);
    RENAMED
        .iter()
        .find(|(from, _)| *from == short)
        .map_or(short, |(_, to)| to)
}

struct Method {
    variant: String,
    service: String,
    path: String,
    name: String,
    client_streaming: bool,
    server_streaming: bool,
}

/// The source of `Service` and `Method`: every service and call of the protos.
fn methods_source(descriptors: &FileDescriptorSet) -> Result<String, fmt::Error> {
    let mut services = Vec::new();
    let mut methods = Vec::new();
    for file in &descriptors.file {
        for service in &file.service {
            let full_name = format!("{}.{}", file.package(), service.name());
            for method in &service.method {
                methods.push(Method {
                    variant: variant(method.name()).to_owned(),
                    service: variant(service.name()).to_owned(),
                    path: format!("/{full_name}/{}", method.name()),
                    name: method.name().to_owned(),
                    client_streaming: method.client_streaming(),
                    server_streaming: method.server_streaming(),
                });
            }
            services.push((variant(service.name()).to_owned(), full_name));
        }
    }
    let mut source = String::new();
    write_services(&mut source, &services)?;
    write_methods(&mut source, &methods)?;
    write_lookup(&mut source, &methods)?;
    Ok(source)
}

fn write_services(source: &mut String, services: &[(String, String)]) -> fmt::Result {
    let derive = "#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]";
    writeln!(
        source,
        "/// A gRPC service of the protos.\n{derive}\npub enum Service {{"
    )?;
    for (variant, full_name) in services {
        writeln!(source, "/// `{full_name}`.\n{variant},")?;
    }
    writeln!(source, "}}\nimpl Service {{")?;
    writeln!(source, "/// The full name, for example `tei.v1.Embed`.")?;
    writeln!(
        source,
        "pub const fn name(self) -> &'static str {{ match self {{"
    )?;
    for (variant, full_name) in services {
        writeln!(source, "Self::{variant} => {full_name:?},")?;
    }
    writeln!(source, "}} }} }}")
}

fn write_methods(source: &mut String, methods: &[Method]) -> fmt::Result {
    let derive = "#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]";
    writeln!(
        source,
        "/// A gRPC method of the protos.\n{derive}\npub enum Method {{"
    )?;
    for Method { variant, path, .. } in methods {
        writeln!(source, "/// `{path}`.\n{variant},")?;
    }
    writeln!(source, "}}\nimpl Method {{")?;
    writeln!(source, "/// Every method, in the order of the protos.")?;
    writeln!(source, "pub const ALL: [Self; {}] = [", methods.len())?;
    for Method { variant, .. } in methods {
        writeln!(source, "Self::{variant},")?;
    }
    writeln!(source, "];")?;
    let property = |source: &mut String, head: &str, value: &dyn Fn(&Method) -> String| {
        writeln!(source, "{head} {{ match self {{")?;
        for method in methods {
            writeln!(source, "Self::{} => {},", method.variant, value(method))?;
        }
        writeln!(source, "}} }}")
    };
    let head =
        "/// The path, for example `/tei.v1.Embed/Embed`.\npub const fn path(self) -> &'static str";
    property(source, head, &|method| format!("{:?}", method.path))?;
    let head = "/// The last segment of the path: the method's name in its service.\npub const fn name(self) -> &'static str";
    property(source, head, &|method| format!("{:?}", method.name))?;
    let head = "/// The service that the method belongs to.\npub const fn service(self) -> Service";
    property(source, head, &|method| {
        format!("Service::{}", method.service)
    })?;
    let head = "/// Whether a call sends several messages.\npub const fn is_client_streaming(self) -> bool";
    property(source, head, &|method| method.client_streaming.to_string())?;
    let head = "/// Whether a call returns several messages.\npub const fn is_server_streaming(self) -> bool";
    property(source, head, &|method| method.server_streaming.to_string())?;
    let head = "/// For a streaming method, the method of the same service that takes one\n/// message: `EmbedStream` has `Embed`, `ModelStreamInfer` has `ModelInfer`.\npub const fn unary(self) -> Option<Self>";
    property(source, head, &|method| {
        let one = method.variant.replacen("Stream", "", 1);
        let found = method.client_streaming
            && methods.iter().any(|other| {
                other.variant == one && other.service == method.service && !other.client_streaming
            });
        if found {
            format!("Some(Self::{one})")
        } else {
            "None".to_owned()
        }
    })?;
    writeln!(source, "}}")
}

/// A path is found by its length first, so that it is compared with a few
/// methods and not with all.
fn write_lookup(source: &mut String, methods: &[Method]) -> fmt::Result {
    let mut by_length: BTreeMap<usize, Vec<&Method>> = BTreeMap::new();
    for method in methods {
        by_length.entry(method.path.len()).or_default().push(method);
    }
    writeln!(source, "impl Method {{")?;
    writeln!(
        source,
        "/// The method of a path, if it is one of the protos."
    )?;
    writeln!(
        source,
        "pub fn from_path(path: &str) -> Option<Self> {{ match path.len() {{"
    )?;
    for (length, methods) in by_length {
        writeln!(source, "{length} => match path {{")?;
        for Method { variant, path, .. } in methods {
            writeln!(source, "{path:?} => Some(Self::{variant}),")?;
        }
        writeln!(source, "_ => None, }},")?;
    }
    writeln!(source, "_ => None, }} }} }}")
}
