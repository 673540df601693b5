//! The fleet as its users meet it: processes, clients of other people, faults.

mod conformance;
mod deadline;
mod failure;
mod http;
mod identity;
mod input;
mod operations;
mod quota;
mod transport;
