//! Scores of texts for a query, in the terms of no provider.

/// One query, and the texts that are scored for it.
#[derive(Debug, Clone, Copy)]
pub struct RerankRequest<'a> {
    /// The query.
    pub query: &'a str,
    /// The texts.
    pub texts: &'a [String],
}

/// Scores in the order of their texts, all finite.
#[derive(Debug, Default, PartialEq)]
pub struct RerankScores {
    /// One for each text.
    pub scores: Vec<f32>,
    /// Tokens that were read, where the service says so.
    pub tokens: u64,
    /// Searches that the service charges for.
    pub searches: u64,
}
