//! API keys: shown once, stored as hashes, known by their prefix.

/// Why a file of keys cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {}

/// The keys of a file.
#[derive(Debug)]
pub struct KeyFile {}

/// A key that is made now.
#[derive(Debug)]
pub struct NewKey {}

/// A key as it is stored.
#[derive(Debug)]
pub struct StoredKey {}
