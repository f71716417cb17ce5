//! A thread that ends its process when it panics: others wait for what it does, and would wait for ever.

/// To be held by the thread, under this name.
pub struct EndsTheProcess(String);

impl EndsTheProcess {
    pub fn with(thread: &str) -> Self {
        Self(thread.to_string())
    }
}

impl Drop for EndsTheProcess {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!(thread = self.0, "an executor panicked; the process ends");
            std::process::exit(101);
        }
    }
}
