use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// What a model does.
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

/// The task that a worker reports for a model. A worker of another
/// implementation may name one that is not known here: its name passes through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReportedTask {
    /// One of the known tasks.
    Known(Task),
    /// Another one, by the name that was reported.
    Other(Arc<str>),
}

impl ReportedTask {
    /// The task of a report's field; none when the field is empty.
    pub fn from_report(name: &str) -> Option<Self> {
        if name.is_empty() {
            return None;
        }
        Some(
            name.parse()
                .map_or_else(|_| Self::Other(name.into()), Self::Known),
        )
    }

    /// The known task.
    pub fn known(&self) -> Option<Task> {
        match self {
            Self::Known(task) => Some(*task),
            Self::Other(_) => None,
        }
    }

    /// Whether it is one of some tasks.
    pub fn is_one_of(&self, tasks: &[Task]) -> bool {
        self.known().is_some_and(|task| tasks.contains(&task))
    }
}

impl fmt::Display for ReportedTask {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Known(task) => task.as_str(),
            Self::Other(name) => name,
        })
    }
}

impl From<Task> for ReportedTask {
    fn from(task: Task) -> Self {
        Self::Known(task)
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

    #[test]
    fn an_unknown_task_passes_through() {
        let reported = ReportedTask::from_report("vision").unwrap();
        assert_eq!(reported.to_string(), "vision");
        assert!(!reported.is_one_of(&Task::ALL));
        let rerank = ReportedTask::from_report("rerank").unwrap();
        assert!(rerank.is_one_of(Task::TEXT));
        assert_eq!(ReportedTask::from_report(""), None);
    }
}
