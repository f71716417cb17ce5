//! The client process, as the comparison sees it.

use super::{Answer, Order};
use crate::error::{BenchError, Result};
use crate::processes::Watched;
use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::Duration;
use torus_tests::{process, wait};

/// It has a volume to flush and release.
const END_WITHIN: Duration = Duration::from_secs(20);

/// Released when it is dropped.
pub struct Client {
    volume: String,
    child: Child,
    /// `None` when it is to end.
    orders: RefCell<Option<ChildStdin>>,
    answers: RefCell<BufReader<ChildStdout>>,
}

impl Client {
    /// Returns when the volume is attached.
    pub fn start(metadata: &str, volume: &str) -> Result<Self> {
        let wrap = BenchError::wrap(format!("the client process of volume {volume}"));
        let mut command = process::program("torus-bench");
        command.args(["library-client", "--metadata", metadata, "--volume", volume]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(wrap)?;
        let stdin = child.stdin.take().expect("it was asked for");
        let stdout = child.stdout.take().expect("it was asked for");
        let (orders, answers) = (RefCell::new(Some(stdin)), RefCell::new(BufReader::new(stdout)));
        let client = Self { volume: volume.to_string(), child, orders, answers };
        match client.answer()? {
            Answer::Ready => Ok(client),
            other => Err(client.failed(format!("it answered {other:?} before anything was asked"))),
        }
    }

    pub fn watched(&self) -> Watched {
        Watched::new(format!("client of {}", self.volume), self.child.id())
    }

    pub fn ask(&self, order: &Order) -> Result<Answer> {
        let mut line = serde_json::to_vec(order).map_err(BenchError::wrap("an order"))?;
        line.push(b'\n');
        if let Some(orders) = &mut *self.orders.borrow_mut() {
            orders.write_all(&line).map_err(|error| self.failed(error.to_string()))?;
        }
        self.answer()
    }

    fn answer(&self) -> Result<Answer> {
        let mut line = String::new();
        let read = self.answers.borrow_mut().read_line(&mut line).map_err(|error| self.failed(error.to_string()))?;
        if read == 0 {
            return Err(self.failed("it ended; what it said stands above".to_string()));
        }
        serde_json::from_str(&line).map_err(|error| self.failed(format!("{error} in its answer {line:?}")))
    }

    fn failed(&self, because: String) -> BenchError {
        BenchError::Failed { what: format!("the client process of volume {}", self.volume), because }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.orders.borrow_mut().take();
        if wait::within(END_WITHIN, || self.child.try_wait().ok().flatten()).is_none() {
            eprintln!("bench: the client of volume {} does not end, so it is killed", self.volume);
            // An error means that it has ended meanwhile.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
