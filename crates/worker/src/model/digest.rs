//! The digest of a model version: over the bytes of its files, and everything
//! else that its outputs depend on.

use std::io::Read;
use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{Context, SHA256};
use engine::{Card, EngineError, LoadOptions};

/// The most files of a model folder.
const FILES_MAX: usize = 10_000;

/// SHA-256, in hexadecimal digits, over the names, lengths and bytes of all
/// files of a folder in order, and over how they are computed. Reads each file
/// once.
pub fn of(folder: &Path, options: &LoadOptions, card: &Card) -> Result<String, EngineError> {
    let mut files = Vec::new();
    list(folder, &mut files)?;
    files.sort();
    let mut context = Context::new(&SHA256);
    let computed = format!(
        "{:?} {:?} {} {} {} {}",
        options.task, options.tokens_max, card.dtype, card.kernels, card.device, card.family
    );
    context.update(computed.as_bytes());
    // Another version of the program may compute other numbers.
    context.update(concat!(" ", env!("CARGO_PKG_VERSION"), "\0").as_bytes());
    let mut buffer = vec![0_u8; 1 << 20];
    for path in files {
        let name = path.strip_prefix(folder).unwrap_or(&path);
        let mut file = std::fs::File::open(&path).map_err(unreadable)?;
        let length = file.metadata().map_err(unreadable)?.len();
        context.update(name.as_os_str().as_encoded_bytes());
        context.update(&[0]);
        context.update(&length.to_le_bytes());
        loop {
            let count = file.read(&mut buffer).map_err(unreadable)?;
            if count == 0 {
                break;
            }
            context.update(buffer.get(..count).unwrap_or_default());
        }
    }
    let digits = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(digits(context.finish().as_ref()))
}

/// The files below a folder. A link may lead to a file, as all do in a snapshot
/// of a Hugging Face cache; one to a folder might lead in a circle.
fn list(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), EngineError> {
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let path = entry.path();
        if entry.file_type().map_err(unreadable)?.is_dir() {
            list(&path, files)?;
            continue;
        }
        let refused = |reason: &str| EngineError::InvalidFile {
            file: entry.file_name().to_string_lossy().into_owned(),
            reason: reason.to_owned(),
        };
        let real = std::fs::metadata(&path).map_err(unreadable)?;
        if real.is_dir() {
            return Err(refused("it is a link to a folder"));
        }
        // Pipes and the like are no part of a model.
        if real.is_file() {
            if files.len() == FILES_MAX {
                return Err(refused("the model has too many files"));
            }
            files.push(path);
        }
    }
    Ok(())
}

fn unreadable(error: std::io::Error) -> EngineError {
    EngineError::Device(format!(
        "the model's files cannot be read: {}",
        error.kind()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_and_name_counts() {
        let folder = std::env::temp_dir().join(format!("andon-digest-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("inner")).unwrap();
        let digits = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo/digits/1");
        let options = LoadOptions::default();
        let card = engine::load(&digits, &options).unwrap().card().clone();
        let digest = || of(&folder, &options, &card).unwrap();
        std::fs::write(folder.join("a"), "one").unwrap();
        let first = digest();
        assert_eq!(first, digest());
        std::fs::write(folder.join("a"), "two").unwrap();
        let changed = digest();
        std::fs::rename(folder.join("a"), folder.join("inner/a")).unwrap();
        let moved = digest();
        std::fs::remove_dir_all(&folder).unwrap();
        assert_ne!(first, changed);
        assert_ne!(changed, moved);
    }

    #[test]
    fn links_stand_for_the_files_that_they_lead_to() {
        let folder = std::env::temp_dir().join(format!("andon-links-{}", std::process::id()));
        let snapshot = folder.join("snapshots/one");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(folder.join("blobs")).unwrap();
        let digits = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo/digits/1");
        let options = LoadOptions::default();
        let card = engine::load(&digits, &options).unwrap().card().clone();
        let digest = || of(&snapshot, &options, &card);
        std::fs::write(folder.join("blobs/a"), "one").unwrap();
        std::os::unix::fs::symlink("../../blobs/a", snapshot.join("weights")).unwrap();
        let first = digest().unwrap();
        std::fs::write(folder.join("blobs/a"), "two").unwrap();
        let changed = digest().unwrap();
        std::fs::remove_file(snapshot.join("weights")).unwrap();
        std::fs::write(snapshot.join("weights"), "two").unwrap();
        let plain = digest().unwrap();
        std::os::unix::fs::symlink("../../blobs", snapshot.join("more")).unwrap();
        let circle = digest();
        std::fs::remove_dir_all(&folder).unwrap();
        assert_ne!(first, changed);
        assert_eq!(changed, plain);
        assert!(matches!(circle, Err(EngineError::InvalidFile { .. })));
    }
}
