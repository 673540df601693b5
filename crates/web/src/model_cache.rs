//! What requests need to know of a model, for the current routing table: after a
//! change of the table it is asked for again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use gateway::Table;

/// Something of each model. Cheap to clone.
#[derive(Debug)]
pub struct ModelCache<T>(Arc<Mutex<Known<T>>>);

/// What is known of the models of one routing table, at most one for each model.
#[derive(Debug)]
struct Known<T> {
    table: Weak<Table>,
    models: HashMap<String, Arc<T>>,
}

impl<T> Clone for ModelCache<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Default for ModelCache<T> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Known {
            table: Weak::new(),
            models: HashMap::new(),
        })))
    }
}

impl<T> ModelCache<T> {
    /// What is known of a model of this table.
    pub fn get(&self, table: &Weak<Table>, model: &str) -> Option<Arc<T>> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.table.ptr_eq(table) {
            return None;
        }
        known.models.get(model).cloned()
    }

    /// Keeps what was learned of a model while this was the table.
    pub fn insert(&self, table: Weak<Table>, model: String, learned: Arc<T>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.table.ptr_eq(&table) {
            known.table = table;
            known.models.clear();
        }
        known.models.insert(model, learned);
    }
}
