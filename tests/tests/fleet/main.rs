//! The fleet as its users meet it: processes, clients of other people, faults.

mod blame;
mod budgets;
mod cache;
mod conformance;
mod deadline;
mod failure;
mod folders;
mod hostile;
mod http;
mod identity;
mod input;
mod openai;
mod operations;
mod outside;
mod prompts;
mod providers;
mod quota;
mod readiness;
mod transport;
mod words;
mod work;
