//! The settings of a worker's models: where they are and how they run.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use engine::{DeviceChoice, Dtype, Kernels};
use protocol::ModelName;

/// A bare folder that serves as a model: `name=path`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BareModel {
    /// The model's name.
    pub name: String,
    /// Its folder.
    pub folder: PathBuf,
}

impl std::str::FromStr for BareModel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, folder) = text
            .split_once('=')
            .ok_or("write NAME=FOLDER, for example minilm=/models/minilm/1")?;
        ModelName::checked(name, "name").map_err(|error| error.to_string())?;
        if !std::path::Path::new(folder).is_dir() {
            return Err(format!("{folder} is not a folder"));
        }
        Ok(Self {
            name: name.to_owned(),
            folder: folder.into(),
        })
    }
}

/// Where a worker's models come from.
#[derive(Debug, Clone, clap::Args)]
pub struct RepositorySettings {
    /// The model repository: DIR/<model>/<version>/ holds the files of a model
    #[arg(long, value_name = "DIR", value_parser = existing_folder)]
    pub repository: Option<PathBuf>,
    /// Serve only this model of the repository; repeat for several
    #[arg(long, value_name = "NAME")]
    pub models: Vec<String>,
    /// Serve a bare Hugging Face folder as a model; repeat for several
    #[arg(long, value_name = "NAME=FOLDER")]
    pub model: Vec<BareModel>,
    /// Where models run: cpu, cuda:N or auto
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = device)]
    pub device: DeviceChoice,
    /// The dtype of models whose andon.toml sets none: f32, bf16, int8 (quantized, CPU only), f16 (CUDA only), or auto: bf16 where the CPU has instructions for it, else f32
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    pub dtype: Dtype,
    /// The CPU kernels: auto, which is the widest instruction set of the CPU; one of amx, avx512bf16, avx512vnni, avx512, avx2 and portable; or candle
    #[arg(long, value_name = "KERNELS", default_value = "auto")]
    pub kernels: Kernels,
    /// Threads that compute a batch on the CPU; default: as many as --cores
    #[arg(long, value_name = "COUNT")]
    pub threads: Option<NonZeroUsize>,
    /// The most bytes of one text, for example 1MiB
    #[arg(long, value_name = "BYTES", default_value = "1MiB", value_parser = platform::config::bytes)]
    pub text_bytes_max: usize,
}

fn existing_folder(text: &str) -> Result<PathBuf, String> {
    let folder = PathBuf::from(text);
    if folder.is_dir() {
        return Ok(folder);
    }
    Err("is not a folder; `make models` brings the demo models into models/".to_owned())
}

fn device(text: &str) -> Result<DeviceChoice, String> {
    let device = text.parse::<DeviceChoice>();
    let usable = device.and_then(|device| device.check().map(|()| device));
    usable.map_err(|error| error.to_string())
}
