//! Which requests of web pages are served. A page need not read a response to
//! unload a model of a gateway in its reader's network, and need not know the
//! gateway's name to call it: its own name may resolve to the gateway's address
//! (DNS rebinding).

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::header::{HOST, ORIGIN};
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Method};
use platform::body::discard;
use protocol::{Error, Kind};

use super::HttpSettings;
use super::error::ApiError;

/// Reads a value of `--cors-origin`. A browser writes an origin in one way
/// (RFC 6454, 6.2): a value that is written in another would never match.
pub fn listed_origin(text: &str) -> Result<String, String> {
    if matches!(text, "*" | "null") {
        return Ok(text.to_owned());
    }
    let refused = |reason: &str| {
        Err(format!(
            "{reason}: write SCHEME://HOST[:PORT] as browsers do, for example https://pages.example, or *"
        ))
    };
    let Some((scheme, authority)) = text.split_once("://") else {
        return refused("it has no scheme");
    };
    let in_scheme = |byte: u8| {
        byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'+' | b'-' | b'.')
    };
    if scheme.is_empty() || !scheme.bytes().all(in_scheme) {
        return refused("its scheme is not one in lower case");
    }
    if authority.contains(['/', '?', '#']) {
        return refused("it has a path, if only a slash at its end");
    }
    if authority.contains('@') {
        return refused("it has a user");
    }
    let (host, port) = match authority.rsplit_once(':') {
        // The colons of an IPv6 address stand in brackets.
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (authority, None),
    };
    if !is_browsers_host(host) {
        return refused("its host is not a name or an address in lower case and ASCII");
    }
    match (port, scheme) {
        (None, _) => {}
        (Some("80"), "http") | (Some("443"), "https") => {
            return refused("its port is the scheme's own, which browsers leave out");
        }
        (Some(port), _) => {
            let number = port.parse::<u16>().ok();
            if number.is_none_or(|number| number == 0 || number.to_string() != port) {
                return refused("its port is no number from 1 to 65535");
            }
        }
    }
    Ok(text.to_owned())
}

/// Whether a host is written as in the origins of browsers.
fn is_browsers_host(host: &str) -> bool {
    if host.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return false;
    }
    if let Some(address) = host.strip_prefix('[') {
        let address = address.strip_suffix(']').unwrap_or_default();
        return address.parse::<Ipv6Addr>().is_ok();
    }
    let in_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    !host.is_empty() && host.bytes().all(in_name)
}

/// How the HTTP port can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exposure {
    /// Whether it speaks TLS.
    pub tls: bool,
    /// Whether it is open to everybody on this machine alone: a loopback address
    /// without a policy.
    pub open_on_loopback: bool,
}

/// The pages and the names of this server whose requests are served.
#[derive(Debug)]
pub struct Guard {
    /// The origins of `--cors-origin`.
    origins: Vec<String>,
    /// The names of `--http-host`, where the name that a request uses decides.
    hosts: Option<Vec<String>>,
    /// The scheme of the port and what follows it in an origin.
    scheme: &'static str,
}

impl Guard {
    /// The guard of a port.
    pub fn new(settings: &HttpSettings, exposure: Exposure) -> Self {
        Self {
            origins: settings.cors_origin.clone(),
            hosts: exposure
                .open_on_loopback
                .then(|| settings.http_host.clone()),
            scheme: if exposure.tls { "https://" } else { "http://" },
        }
    }

    fn check(&self, request: &Parts) -> Result<(), Error> {
        let host = host(request);
        if !self.is_name_of_server(host) {
            return Err(forbidden(
                "the host must be an IP address, localhost or a name of --http-host",
            ));
        }
        if is_read(&request.method) || self.is_allowed_write(&request.headers, host) {
            return Ok(());
        }
        Err(forbidden(
            "web pages of other origins may not call: see --cors-origin",
        ))
    }

    /// Whether a request uses a name that only this server can have. Browsers
    /// always send one.
    fn is_name_of_server(&self, host: Option<&[u8]>) -> bool {
        let (Some(names), Some(host)) = (&self.hosts, host) else {
            return true;
        };
        let Ok(authority) = Authority::try_from(host) else {
            return false;
        };
        let name = authority.host();
        let address = name.trim_start_matches('[').trim_end_matches(']');
        let mut names = names.iter().map(String::as_str).chain(["localhost"]);
        address.parse::<IpAddr>().is_ok() || names.any(|own| own.eq_ignore_ascii_case(name))
    }

    /// Whether a request that may change something comes from no page, or from a
    /// page that may. Browsers name the page's origin with every such request;
    /// `null` is the origin of pages that hide theirs.
    fn is_allowed_write(&self, headers: &HeaderMap, host: Option<&[u8]>) -> bool {
        let mut origins = headers.get_all(ORIGIN).iter();
        match (origins.next(), origins.next()) {
            (Some(origin), None) => self.is_allowed(origin.as_bytes(), host),
            (Some(_), Some(_)) => false,
            (None, _) => is_of_no_page(headers),
        }
    }

    fn is_allowed(&self, origin: &[u8], host: Option<&[u8]>) -> bool {
        let listed = |listed: &String| listed == "*" || listed.as_bytes() == origin;
        let own = || {
            let rest = origin.strip_prefix(self.scheme.as_bytes());
            rest.zip(host)
                .is_some_and(|(rest, host)| rest.eq_ignore_ascii_case(host))
        };
        self.origins.iter().any(listed) || own()
    }
}

/// The host and port that a request names: HTTP/2 has them in the URI.
fn host(request: &Parts) -> Option<&[u8]> {
    let authority = request.uri.authority();
    let authority = authority.map(|authority| authority.as_str().as_bytes());
    authority.or_else(|| request.headers.get(HOST).map(HeaderValue::as_bytes))
}

fn is_read(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS)
}

/// Whether a request without an origin is no page's, or that of a person who
/// typed its address. A browser that sends any of the `Sec-Fetch` fields sends the
/// site; Node's `fetch` sends the mode alone.
fn is_of_no_page(headers: &HeaderMap) -> bool {
    let site = headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
    site.is_none_or(|site| matches!(site, b"same-origin" | b"none"))
}

fn forbidden(message: &'static str) -> Error {
    Error::new(Kind::Forbidden, message)
}

/// Refuses requests that the guard does not let pass.
pub async fn guard(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    if let Err(error) = guard.check(&head) {
        discard(body).await;
        return ApiError::from(error).into_response();
    }
    next.run(Request::from_parts(head, body)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: Exposure = Exposure {
        tls: false,
        open_on_loopback: true,
    };
    const PUBLIC: Exposure = Exposure {
        tls: false,
        open_on_loopback: false,
    };
    const TLS: Exposure = Exposure {
        tls: true,
        open_on_loopback: false,
    };

    fn settings(origins: &[&str], hosts: &[&str]) -> HttpSettings {
        let owned = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
        HttpSettings {
            cors_origin: owned(origins),
            http_host: owned(hosts),
        }
    }

    fn passes(guard: &Guard, method: Method, headers: &[(&str, &str)]) -> bool {
        let mut request = http::Request::builder().method(method).uri("/v2");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        guard
            .check(&request.body(()).unwrap().into_parts().0)
            .is_ok()
    }

    /// Whether a POST to the server's own name passes.
    fn writes(guard: &Guard, headers: &[(&str, &str)]) -> bool {
        let host = [("host", "andon.example:8000")];
        passes(guard, Method::POST, &[&host[..], headers].concat())
    }

    #[test]
    fn an_origin_that_no_browser_writes_is_refused() {
        for origin in [
            "*",
            "null",
            "https://pages.example",
            "http://pages.example:8080",
            "https://pages.example:80",
            "http://localhost:3000",
            "http://127.0.0.1",
            "http://[::1]:3000",
            "http://[::1]",
            "https://xn--bcher-kva.example",
            "chrome-extension://abcdefgh",
        ] {
            assert_eq!(listed_origin(origin).as_deref(), Ok(origin));
        }
        for (origin, reason) in [
            ("", "scheme"),
            ("pages.example", "scheme"),
            ("pages.example:443", "scheme"),
            ("//pages.example", "scheme"),
            ("://pages.example", "scheme"),
            ("HTTPS://pages.example", "scheme"),
            ("https://pages.example/", "path"),
            ("https://pages.example/app", "path"),
            ("https://pages.example?a", "path"),
            ("https://user@pages.example", "user"),
            ("https://Pages.example", "host"),
            ("https://b\u{fc}cher.example", "host"),
            ("https://*.example", "host"),
            ("https://", "host"),
            ("https:// pages.example", "host"),
            ("https://[::1", "host"),
            ("https://::1", "host"),
            ("https://pages.example:443", "port"),
            ("http://pages.example:80", "port"),
            ("https://pages.example:", "port"),
            ("https://pages.example:0", "port"),
            ("https://pages.example:08080", "port"),
            ("https://pages.example:65536", "port"),
        ] {
            let error = listed_origin(origin).unwrap_err();
            let (said, _) = error.split_once(": write ").unwrap();
            assert!(said.contains(reason), "{origin}: {error}");
        }
    }

    #[test]
    fn a_write_with_an_origin_comes_from_an_allowed_page() {
        let guard = Guard::new(&settings(&["https://pages.example"], &[]), PUBLIC);
        for (origin, allowed) in [
            ("https://pages.example", true),
            ("http://andon.example:8000", true),
            ("http://ANDON.example:8000", true),
            ("https://andon.example:8000", false),
            ("http://andon.example", false),
            ("http://pages.example", false),
            ("https://pages.example.evil", false),
            ("https://evil.example", false),
            ("null", false),
            ("", false),
        ] {
            for site in [None, Some("same-origin"), Some("cross-site")] {
                let site = site.map(|site| ("sec-fetch-site", site));
                let headers: Vec<_> = [("origin", origin)].into_iter().chain(site).collect();
                assert_eq!(writes(&guard, &headers), allowed, "{headers:?}");
            }
            for read in [Method::GET, Method::HEAD, Method::OPTIONS] {
                assert!(passes(&guard, read, &[("origin", origin)]));
            }
        }
        let own = ("origin", "http://andon.example:8000");
        assert!(!writes(&guard, &[own, own]), "two origins");
        for method in [Method::PUT, Method::DELETE, Method::PATCH] {
            let headers = [("host", "a"), ("origin", "http://b")];
            assert!(!passes(&guard, method.clone(), &headers));
            assert!(passes(&guard, method, &[("host", "b"), headers[1]]));
        }
        let tls = Guard::new(&settings(&[], &[]), TLS);
        assert!(writes(&tls, &[("origin", "https://andon.example:8000")]));
        assert!(!writes(&tls, &[own]));
        let all = Guard::new(&settings(&["*"], &[]), PUBLIC);
        assert!(writes(&all, &[("origin", "https://evil.example")]));
    }

    #[test]
    fn a_write_without_an_origin_is_of_no_page() {
        for origins in [&[][..], &["https://pages.example"]] {
            let guard = Guard::new(&settings(origins, &[]), PUBLIC);
            assert!(writes(&guard, &[]));
            assert!(writes(&guard, &[("content-type", "text/plain")]));
            for (site, allowed) in [
                ("cross-site", false),
                ("same-site", false),
                ("", false),
                ("same-origin", true),
                ("none", true),
            ] {
                assert_eq!(writes(&guard, &[("sec-fetch-site", site)]), allowed);
            }
            assert!(writes(&guard, &[("sec-fetch-mode", "cors")]));
        }
    }

    #[test]
    fn an_open_loopback_port_is_called_by_names_of_its_own() {
        let guard = Guard::new(&settings(&[], &["andon.test"]), OPEN);
        for (host, allowed) in [
            ("127.0.0.1:8000", true),
            ("127.0.0.1", true),
            ("[::1]:8000", true),
            ("localhost:8000", true),
            ("LOCALHOST", true),
            ("andon.test:8000", true),
            ("rebound.example:8000", false),
            ("localhost.example", false),
            ("127.0.0.1.example", false),
            ("127.0.0.1:8000/", false),
            ("", false),
        ] {
            for method in [Method::GET, Method::POST, Method::OPTIONS] {
                let headers = [("host", host)];
                assert_eq!(passes(&guard, method, &headers), allowed, "{host}");
            }
        }
        // A rebound page is of the same origin as the name that it uses.
        let own = ("origin", "http://rebound.example:8000");
        let host = ("host", "rebound.example:8000");
        assert!(!passes(&guard, Method::POST, &[host, own]));
        assert!(passes(&guard, Method::GET, &[]), "no browser");
        let public = Guard::new(&settings(&[], &[]), PUBLIC);
        assert!(passes(&public, Method::GET, &[host]));
        let absolute = http::Request::get("http://rebound.example/v2").body(());
        let absolute = absolute.unwrap().into_parts().0;
        assert!(guard.check(&absolute).is_err());
    }
}
