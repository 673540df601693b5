use std::fmt;
use std::str::FromStr;

/// The task of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Task {
    /// Texts to vectors.
    Embedding,
    /// Texts to scores of labels.
    Classification,
    /// A query and texts to scores of relevance.
    Rerank,
    /// Messages to text.
    Generation,
    /// Rows of numbers to scores or values.
    Tabular,
}

impl Task {
    /// Every task.
    pub const ALL: [Self; 5] = [
        Self::Embedding,
        Self::Classification,
        Self::Rerank,
        Self::Generation,
        Self::Tabular,
    ];
    /// The tasks of models that read texts with a tokenizer of their own.
    pub const TEXT: &[Self] = &[Self::Embedding, Self::Classification, Self::Rerank];

    /// The name that reports, configurations and messages have for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Classification => "classification",
            Self::Rerank => "rerank",
            Self::Generation => "generation",
            Self::Tabular => "tabular",
        }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// A name is not that of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be embedding, classification, rerank, generation or tabular")]
pub struct UnknownTask;

impl FromStr for Task {
    type Err = UnknownTask;

    fn from_str(name: &str) -> Result<Self, UnknownTask> {
        let mut all = Self::ALL.into_iter();
        all.find(|task| task.as_str() == name).ok_or(UnknownTask)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for task in Task::ALL {
            assert_eq!(task.to_string().parse(), Ok(task));
        }
        assert_eq!("Embedding".parse::<Task>(), Err(UnknownTask));
        assert_eq!("".parse::<Task>(), Err(UnknownTask));
    }
}
