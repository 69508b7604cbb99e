//! Serves counts over HTTP: `/metrics` in Prometheus's text formats, `/healthz` and
//! `/readyz`.
//!
//! What is counted is its owner's: a [`Registry`] whose collectors look at the live
//! state when somebody asks, so that nothing costs while nobody does. Two threads at
//! most, one for the connections and one for the counts: a clip's metadata on a slow
//! disk delays the answers of `/metrics` and nothing else.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{ACCEPT, ALLOW, CACHE_CONTROL, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::{prometheus_text, text as openmetrics_text};
use prometheus_client::registry::Registry;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use crate::privileges::{self, Capabilities};

/// Connections at once; others wait in the kernel until one of them ends.
const CONNECTIONS: usize = 32;
/// How long a request may take to come, and a connection to end.
const REQUEST: Duration = Duration::from_secs(2);
const CONNECTION: Duration = Duration::from_secs(10);
/// Of a request.
const HEADERS: usize = 64;
const HEADER_BYTES: usize = 16 << 10;

const PLAIN: &str = "text/plain; charset=utf-8";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Whether what is counted is well: one line each, for people.
pub trait Health: Send + Sync + 'static {
    /// Whether it works; if not, only a new start helps.
    ///
    /// # Errors
    /// What is wrong.
    fn health(&self) -> Result<String, String>;

    /// Whether it does what it was started for.
    ///
    /// # Errors
    /// What is missing.
    fn readiness(&self) -> Result<String, String>;
}

/// A running server; dropped, it ends, and with it every connection.
pub struct Server {
    address: SocketAddr,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What is served.
struct Site {
    registry: Registry,
    health: Arc<dyn Health>,
    /// Taken by the one who counts: of those who wait, a connection that ends does so
    /// for good.
    counting: Arc<Semaphore>,
}

impl Server {
    /// Listens at an address, and serves there; port 0 stands for any that is free. The
    /// threads that serve keep these capabilities alone.
    ///
    /// # Errors
    /// Those of listening there, and of starting a thread.
    pub fn start(
        address: SocketAddr,
        registry: Registry,
        health: Arc<dyn Health>,
        keep: Capabilities,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(1)
            .thread_name("vmafx-scrape")
            .build()?;
        let listener = {
            let _entered = runtime.enter();
            tokio::net::TcpListener::from_std(listener)?
        };
        let site = Arc::new(Site {
            registry,
            health,
            counting: Arc::new(Semaphore::new(1)),
        });
        let (end, ended) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("vmafx-metrics".into())
            .spawn(move || {
                // Which does not refuse to take away; strangers talk to this thread.
                let _ = privileges::keep(keep);
                runtime.block_on(async {
                    tokio::spawn(accept(listener, site));
                    // Its owner has gone.
                    let _ = ended.await;
                });
                // A count that hangs is not waited for.
                runtime.shutdown_background();
            })?;
        Ok(Self {
            address,
            end: Some(end),
            thread: Some(thread),
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end = None;
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            // It has panicked; its message is on standard error.
        }
    }
}

async fn accept(listener: tokio::net::TcpListener, site: Arc<Site>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // Nobody closes it.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return;
        };
        let Ok((stream, _)) = listener.accept().await else {
            // The client has gone, or no descriptor is left for now.
            sleep(Duration::from_millis(50)).await;
            continue;
        };
        let site = Arc::clone(&site);
        tokio::spawn(async move {
            // Whoever is too slow is left.
            let _ = timeout(CONNECTION, serve(stream, site)).await;
            drop(slot);
        });
    }
}

async fn serve(stream: TcpStream, site: Arc<Site>) -> hyper::Result<()> {
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST)
        .keep_alive(false)
        .max_headers(HEADERS)
        .max_buf_size(HEADER_BYTES)
        .serve_connection(
            TokioIo::new(stream),
            service_fn(move |request| answer(request, Arc::clone(&site))),
        )
        .await
}

async fn answer(
    request: Request<Incoming>,
    site: Arc<Site>,
) -> Result<Response<String>, Infallible> {
    let path = request.uri().path();
    if !matches!(path, "/metrics" | "/healthz" | "/readyz") {
        let what = "not found: /metrics, /healthz and /readyz are served\n";
        return Ok(text(StatusCode::NOT_FOUND, PLAIN, what.into()));
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let what = "only GET and HEAD are answered\n";
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, PLAIN, what.into());
        let allowed = hyper::header::HeaderValue::from_static("GET, HEAD");
        response.headers_mut().insert(ALLOW, allowed);
        return Ok(response);
    }
    Ok(match path {
        "/metrics" => counts(wants_open_metrics(&request), site).await,
        "/healthz" => state(site.health.health()),
        _ => state(site.health.readiness()),
    })
}

fn text(status: StatusCode, kind: &'static str, body: String) -> Response<String> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let value = hyper::header::HeaderValue::from_static;
    response.headers_mut().insert(CONTENT_TYPE, value(kind));
    response
        .headers_mut()
        .insert(CACHE_CONTROL, value("no-store"));
    response
}

fn state(state: Result<String, String>) -> Response<String> {
    match state {
        Ok(line) => text(StatusCode::OK, PLAIN, line + "\n"),
        Err(line) => text(StatusCode::SERVICE_UNAVAILABLE, PLAIN, line + "\n"),
    }
}

/// Whether a client takes OpenMetrics; who does, prefers it.
fn wants_open_metrics(request: &Request<Incoming>) -> bool {
    let accepted = request.headers().get_all(ACCEPT).into_iter();
    accepted
        .filter_map(|value| value.to_str().ok())
        .any(accepts_open_metrics)
}

fn accepts_open_metrics(accept: &str) -> bool {
    accept.split(',').any(|offer| {
        let mut parts = offer.split(';').map(str::trim);
        let refused = |weight: &str| weight.parse().is_ok_and(|weight: f32| weight == 0.0);
        parts.next() == Some("application/openmetrics-text")
            && !parts.any(|part| part.strip_prefix("q=").is_some_and(refused))
    })
}

async fn counts(open_metrics: bool, site: Arc<Site>) -> Response<String> {
    // Nobody closes it.
    let turn = Arc::clone(&site.counting).acquire_owned().await;
    let counted = spawn_blocking(move || {
        let _turn = turn;
        let mut body = String::new();
        if open_metrics {
            openmetrics_text::encode(&mut body, &site.registry)
        } else {
            prometheus_text::encode(&mut body, &site.registry)
        }
        .map(|()| body)
    });
    let kind = if open_metrics {
        OPEN_METRICS
    } else {
        prometheus_text::CONTENT_TYPE
    };
    match counted.await {
        Ok(Ok(body)) => text(StatusCode::OK, kind, body),
        // A collector has failed or panicked; half of the counts are none.
        _ => text(
            StatusCode::INTERNAL_SERVER_ERROR,
            PLAIN,
            "counting failed\n".into(),
        ),
    }
}

#[cfg(test)]
mod tests;
