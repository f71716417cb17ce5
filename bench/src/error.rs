//! How a measurement fails: what was being done, why, and what to do about it.

use thiserror::Error;

pub type Result<T> = std::result::Result<T, BenchError>;

#[derive(Debug, Error)]
pub enum BenchError {
    #[error("{what}: {because}")]
    Failed { what: String, because: String },
    #[error("{program} cannot be started ({because}); install it with `apt-get install {package}`")]
    Missing { program: &'static str, package: &'static str, because: std::io::Error },
}

impl BenchError {
    /// For `map_err`: `what` was tried.
    pub fn wrap<E: ToString>(what: impl Into<String>) -> impl FnOnce(E) -> BenchError {
        let what = what.into();
        move |because| BenchError::Failed { what, because: because.to_string() }
    }
}
