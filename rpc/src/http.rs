//! What a process tells over HTTP (`--http`): `/metrics` in Prometheus' text format, and `/health`, for whoever watches it.
//!
//! On a thread of its own, never on an executor of the data path. Connections are bounded in number, time and bytes, and
//! carry one request each: who is slow or hostile costs nobody but himself.

use futures::future::BoxFuture;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::cell::Cell;
use std::convert::Infallible;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::rc::Rc;
use std::str::FromStr;
use std::sync::Arc;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::task::{LocalSet, spawn_local};
use torus_schema::limits::{
    ACCEPT_RETRY_AFTER, HTTP_ANSWER_TIME, HTTP_CONNECTION_TIME, HTTP_CONNECTIONS_MAX, HTTP_HEAD_BYTES_MAX,
    HTTP_HEAD_TIME,
};

const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
const PLAIN_TYPE: &str = "text/plain; charset=utf-8";

/// Where it is asked for: `PORT` on this host alone, or `ADDRESS:PORT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HttpAddress(pub SocketAddr);

impl FromStr for HttpAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(port) = text.trim_start_matches(':').parse::<u16>() {
            return Ok(Self(SocketAddr::from((Ipv4Addr::LOCALHOST, port))));
        }
        text.parse().map(Self).map_err(|_| format!("found {text:?}, expected PORT (of this host) or ADDRESS:PORT"))
    }
}

impl fmt::Display for HttpAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What is told at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    pub metrics: String,
    /// Or what is wrong.
    pub health: Result<(), String>,
}

/// Asked at each request, so that nothing is kept up to date for nobody. `None`: the process is ending.
pub type Tell = Arc<dyn Fn() -> BoxFuture<'static, Option<Told>> + Send + Sync>;

#[derive(Debug, Error)]
pub enum HttpError {
    #[error("--http {address}: {because}; choose another address, or port 0 for any free one")]
    Listen { address: HttpAddress, because: std::io::Error },
    #[error("--http: no thread could be started: {because}")]
    Thread { because: std::io::Error },
}

/// Bound, so that a port that is taken is found out before anything else is begun.
pub struct HttpListener {
    listener: TcpListener,
    pub address: SocketAddr,
}

impl HttpListener {
    pub fn bind(address: HttpAddress) -> Result<Self, HttpError> {
        let failed = |because| HttpError::Listen { address, because };
        let listener = TcpListener::bind(address.0).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self { address: listener.local_addr().map_err(failed)?, listener })
    }

    /// Until the process ends.
    pub fn serve(self, tell: Tell) -> Result<(), HttpError> {
        let failed = |because| HttpError::Thread { because };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let work = move || {
            LocalSet::new().block_on(&runtime, async move {
                match tokio::net::TcpListener::from_std(self.listener) {
                    Ok(listener) => accept(listener, tell).await,
                    Err(error) => tracing::error!(%error, "--http: nothing is told"),
                }
            });
        };
        std::thread::Builder::new().name("http".to_string()).spawn(work).map_err(failed)?;
        Ok(())
    }
}

async fn accept(listener: tokio::net::TcpListener, tell: Tell) {
    let open = Rc::new(Cell::new(0));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "--http: accept failed");
                tokio::time::sleep(ACCEPT_RETRY_AFTER).await;
                continue;
            }
        };
        if open.get() >= HTTP_CONNECTIONS_MAX {
            tracing::debug!(limit = HTTP_CONNECTIONS_MAX, "--http: too many connections, closed one");
            continue;
        }
        open.set(open.get() + 1);
        let (open, tell) = (open.clone(), tell.clone());
        spawn_local(async move {
            if tokio::time::timeout(HTTP_CONNECTION_TIME, talk(stream, tell)).await.is_err() {
                tracing::debug!("--http: a client was too slow");
            }
            open.set(open.get() - 1);
        });
    }
}

async fn talk(stream: TcpStream, tell: Tell) {
    let service = service_fn(move |request: Request<Incoming>| {
        let tell = tell.clone();
        async move { Ok::<_, Infallible>(answer(&request, &tell).await) }
    });
    let mut connection = http1::Builder::new();
    connection.timer(TokioTimer::new()).header_read_timeout(HTTP_HEAD_TIME);
    connection.max_buf_size(HTTP_HEAD_BYTES_MAX).keep_alive(false);
    if let Err(error) = connection.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(%error, "--http: connection ended");
    }
}

async fn answer(request: &Request<Incoming>, tell: &Tell) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return page(StatusCode::METHOD_NOT_ALLOWED, PLAIN_TYPE, "only GET and HEAD are answered\n".to_string());
    }
    let is_health = match request.uri().path() {
        "/metrics" => false,
        "/health" => true,
        _ => return page(StatusCode::NOT_FOUND, PLAIN_TYPE, "there are /metrics and /health\n".to_string()),
    };
    let unavailable = |because: &str| page(StatusCode::SERVICE_UNAVAILABLE, PLAIN_TYPE, format!("{because}\n"));
    match tokio::time::timeout(HTTP_ANSWER_TIME, tell()).await {
        Err(_) => unavailable(&format!("the process did not answer within {HTTP_ANSWER_TIME:?}")),
        Ok(None) => unavailable("the process is ending"),
        Ok(Some(told)) if !is_health => page(StatusCode::OK, METRICS_TYPE, told.metrics),
        Ok(Some(Told { health: Ok(()), .. })) => page(StatusCode::OK, PLAIN_TYPE, "serving\n".to_string()),
        Ok(Some(Told { health: Err(because), .. })) => unavailable(&because),
    }
}

fn page(status: StatusCode, content_type: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn serving(tell: impl Fn() -> Option<Told> + Send + Sync + 'static) -> SocketAddr {
        let listener = HttpListener::bind("0".parse().unwrap()).unwrap();
        let address = listener.address;
        assert!(address.ip().is_loopback());
        listener.serve(Arc::new(move || std::future::ready(tell()).boxed())).unwrap();
        address
    }

    fn well() -> Option<Told> {
        Some(Told { metrics: "torus_x 1\n".to_string(), health: Ok(()) })
    }

    /// Everything that comes until the server closes.
    fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        // One that is cut off without an answer is told by its emptiness.
        let _ = stream.read_to_string(&mut answer);
        answer
    }

    fn get(address: SocketAddr, path: &str) -> String {
        ask(address, &format!("GET {path} HTTP/1.1\r\nHost: here\r\n\r\n"))
    }

    #[test]
    fn an_address_is_a_port_of_this_host_or_a_whole_one() {
        let parsed = |text: &str| text.parse::<HttpAddress>().map(|address| address.to_string());
        assert_eq!(parsed("9100"), Ok("127.0.0.1:9100".to_string()));
        assert_eq!(parsed(":9100"), parsed("9100"));
        assert_eq!(parsed("10.0.0.7:9100"), Ok("10.0.0.7:9100".to_string()));
        assert!(parsed("localhost").unwrap_err().contains("localhost"));
    }

    #[test]
    fn metrics_and_health_are_told_as_they_are_now() {
        let is_well = Arc::new(AtomicBool::new(true));
        let told = is_well.clone();
        let address = serving(move || {
            let health = if told.load(Ordering::SeqCst) { Ok(()) } else { Err("shard 0: no disk".to_string()) };
            Some(Told { health, ..well()? })
        });
        let metrics = get(address, "/metrics");
        assert!(metrics.starts_with("HTTP/1.1 200") && metrics.contains("version=0.0.4"), "{metrics}");
        assert!(metrics.ends_with("\r\n\r\ntorus_x 1\n"), "{metrics}");
        assert!(get(address, "/health").starts_with("HTTP/1.1 200"));
        is_well.store(false, Ordering::SeqCst);
        let health = get(address, "/health");
        assert!(health.starts_with("HTTP/1.1 503") && health.ends_with("shard 0: no disk\n"), "{health}");
        assert!(get(address, "/").starts_with("HTTP/1.1 404"));
        assert!(ask(address, "POST /metrics HTTP/1.1\r\nHost: here\r\n\r\n").starts_with("HTTP/1.1 405"));
        let ending = serving(|| None);
        assert!(get(ending, "/metrics").starts_with("HTTP/1.1 503"));
    }

    #[test]
    fn garbage_and_too_long_a_request_end_their_own_connection_and_no_other() {
        let address = serving(well);
        let long = format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(2 * HTTP_HEAD_BYTES_MAX));
        for request in ["\0\0\0\0\r\n\r\n", "GET\r\n\r\n", &long] {
            assert!(!ask(address, request).contains("torus_x"), "{request}");
            assert!(get(address, "/metrics").contains("torus_x"));
        }
    }

    #[test]
    fn more_clients_than_are_let_in_are_closed_and_their_places_are_given_back() {
        let address = serving(well);
        let silent: Vec<TcpStream> = (0..HTTP_CONNECTIONS_MAX).map(|_| TcpStream::connect(address).unwrap()).collect();
        assert_eq!(get(address, "/metrics"), "");
        drop(silent);
        while get(address, "/metrics").is_empty() {}
    }
}
