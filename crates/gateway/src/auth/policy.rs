//! The policy file: which tenant may call which model, and how much.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::limit::Quota;

/// Why a policy cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// The file cannot be read.
    #[error("the file of {what} cannot be read: {reason}")]
    Unreadable {
        /// What it holds.
        what: &'static str,
        /// Why.
        reason: String,
    },
    /// The file is not what it should be.
    #[error("the file of {what}: {reason}")]
    Wrong {
        /// What it holds.
        what: &'static str,
        /// What is wrong and where.
        reason: String,
    },
}

/// Who may do what.
#[derive(Debug, Default)]
pub struct Policy {
    /// The tenants by their names.
    pub tenants: BTreeMap<String, std::sync::Arc<Tenant>>,
}

/// A model's name, where `*` stands for any characters.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Pattern(String);

impl Pattern {
    /// Whether a name is one of those that the pattern stands for.
    pub fn matches(&self, name: &str) -> bool {
        self.0 == "*" || self.0 == name
    }
}

/// A team or a customer that shares the fleet with others.
#[derive(Debug, Clone, PartialEq)]
pub struct Tenant {
    /// Its name.
    pub name: String,
    /// Whether it may load, unload and change settings.
    pub administrator: bool,
    /// The models and aliases that it may call.
    pub models: Vec<Pattern>,
    /// Its share under overload, relative to those of other tenants.
    pub weight: u32,
    /// Tenants of one scope share cached answers; it is the tenant's own name
    /// unless the policy says otherwise.
    pub cache_scope: String,
    /// How much it may call altogether.
    pub quota: Quota,
    /// How much it may call of some models.
    pub model_quotas: Vec<(Pattern, Quota)>,
}

impl Tenant {
    /// Everybody, where nobody is asked who they are.
    pub fn anyone() -> Self {
        Self {
            name: "anyone".to_owned(),
            administrator: true,
            models: vec![Pattern("*".to_owned())],
            weight: 1,
            cache_scope: "anyone".to_owned(),
            quota: Quota::default(),
            model_quotas: Vec::new(),
        }
    }

    /// Whether it may call a model or alias.
    pub fn may_call(&self, model: &str) -> bool {
        self.models.iter().any(|pattern| pattern.matches(model))
    }
}
