//! Tokens that another party signed.
