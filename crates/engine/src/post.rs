//! Post-processing of embeddings and logits after the forward pass, on the caller's thread.

use std::fmt;
use std::str::FromStr;

use crate::error::EngineError;

/// What turns the logits of a row into scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScoreActivation {
    /// Probabilities that sum to 1.
    Softmax,
    /// A probability for each label, independent of the others.
    Sigmoid,
    /// The logits are the scores, for example of a regression.
    Identity,
}

impl ScoreActivation {
    const ALL: [Self; 3] = [Self::Softmax, Self::Sigmoid, Self::Identity];

    /// The name in configuration files and in metadata.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Softmax => "softmax",
            Self::Sigmoid => "sigmoid",
            Self::Identity => "identity",
        }
    }

    /// Of the class of torch that a CrossEncoder names for its scores. Another package's class of
    /// the same last name is another one.
    pub(crate) fn from_class(name: &str) -> Option<Self> {
        match name {
            "torch.nn.modules.activation.Sigmoid" | "torch.nn.Sigmoid" => Some(Self::Sigmoid),
            "torch.nn.modules.linear.Identity" | "torch.nn.Identity" => Some(Self::Identity),
            _ => None,
        }
    }

    /// Turns the logits of one row into its scores.
    pub fn apply(self, scores: &mut [f32]) {
        match self {
            Self::Softmax => softmax(scores),
            Self::Sigmoid => sigmoid(scores),
            Self::Identity => {}
        }
    }
}

impl fmt::Display for ScoreActivation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl FromStr for ScoreActivation {
    type Err = EngineError;

    fn from_str(name: &str) -> Result<Self, EngineError> {
        let activation = Self::ALL.into_iter().find(|one| one.as_str() == name);
        activation.ok_or_else(|| {
            EngineError::Unsupported(format!(
                "activation '{name}' is not supported: use {}",
                Self::ALL.map(Self::as_str).join(", ")
            ))
        })
    }
}

/// Normalizes a vector to Euclidean length 1 (L2). A vector of zeros stays as it is.
pub fn normalize(vector: &mut [f32]) {
    let length = vector.iter().map(|value| value * value).sum::<f32>().sqrt();
    // The same minimum as torch.nn.functional.normalize, so that both agree on tiny vectors.
    let scale = 1.0 / length.max(1e-12);
    for value in vector {
        *value *= scale;
    }
}

/// Turns logits into probabilities that sum to 1. The largest is subtracted first, so that no
/// finite logit overflows.
pub fn softmax(scores: &mut [f32]) {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for score in scores.iter_mut() {
        *score = (*score - largest).exp();
        sum += *score;
    }
    for score in scores {
        *score /= sum;
    }
}

/// Turns each logit into a probability independent of the others.
pub fn sigmoid(scores: &mut [f32]) {
    for score in scores {
        *score = 1.0 / (1.0 + (-*score).exp());
    }
}

/// The index of the largest score, the first of equal ones; 0 for no scores.
pub fn argmax(scores: &[f32]) -> usize {
    let mut best = 0;
    for (index, score) in scores.iter().enumerate() {
        if scores.get(best).is_some_and(|largest| score > largest) {
            best = index;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalize_makes_length_one_and_keeps_zeros() {
        let mut vector = [3.0, 4.0];
        normalize(&mut vector);
        assert_eq!(vector, [0.6, 0.8]);
        let mut zeros = [0.0, 0.0];
        normalize(&mut zeros);
        assert_eq!(zeros, [0.0, 0.0]);
    }

    #[test]
    fn softmax_sums_to_one_even_for_large_logits() {
        let mut scores = [1000.0, 1000.0, -1000.0];
        softmax(&mut scores);
        assert_eq!(scores, [0.5, 0.5, 0.0]);
    }

    #[test]
    fn each_activation_is_known_by_its_name_and_does_what_it_says() {
        let scores = |activation: &str| {
            let mut scores = [0.0, 2.0];
            let activation: ScoreActivation = activation.parse().unwrap();
            activation.apply(&mut scores);
            scores
        };
        assert_eq!(scores("identity"), [0.0, 2.0]);
        assert_eq!(scores("sigmoid")[0], 0.5);
        assert!((scores("softmax").iter().sum::<f32>() - 1.0).abs() < 1e-6);
        let error = "tanh".parse::<ScoreActivation>().unwrap_err().to_string();
        assert!(error.contains("softmax, sigmoid, identity"), "{error}");
    }

    #[test]
    fn argmax_takes_the_first_of_equals() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), 1);
        assert_eq!(argmax(&[]), 0);
    }
}
