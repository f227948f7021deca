//! apt: its sources in both formats, and its proxy.

use super::host::{Found, Host};

/// The servers of the host's apt.
pub(super) fn read(host: &Host, found: &mut Found) {
    let main = host.system("/etc/apt/sources.list");
    if let Some(text) = found.file(&main) {
        one_line(&main.display().to_string(), &text, found);
    }
    for (path, text) in found.files(&host.system("/etc/apt/sources.list.d"), &["list", "sources"]) {
        let origin = path.display().to_string();
        match path.extension().is_some_and(|extension| extension == "list") {
            true => one_line(&origin, &text, found),
            false => deb822(&origin, &text, found),
        }
    }
    if found.rules.is_empty() {
        found.error.get_or_insert_with(|| "the host has no sources of apt that name a server".to_owned());
        return;
    }
    let main = host.system("/etc/apt/apt.conf");
    let text = found.file(&main).map(|text| (main, text));
    // apt reads files without an extension, too.
    let more = found.files(&host.system("/etc/apt/apt.conf.d"), &["conf", ""]);
    for (path, text) in more.into_iter().chain(text) {
        proxies(&path.display().to_string(), &text, found);
    }
}

/// `deb [OPTIONS] URI SUITE COMPONENTS`
fn one_line(origin: &str, text: &str, found: &mut Found) {
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let Some(rest) = line.strip_prefix("deb-src").or_else(|| line.strip_prefix("deb")) else { continue };
        let rest = rest.trim_start();
        let rest = match rest.strip_prefix('[') {
            Some(options) => options.split_once(']').map_or("", |(_, rest)| rest),
            None => rest,
        };
        if let Some(uri) = rest.split_whitespace().next() {
            server(origin, uri, found);
        }
    }
}

/// Paragraphs of `Field: value`, with `URIs`.
fn deb822(origin: &str, text: &str, found: &mut Found) {
    let mut uris: Vec<&str> = Vec::new();
    let mut is_enabled = true;
    let mut field = String::new();
    // An empty line at the end ends the last paragraph.
    for line in text.lines().chain([""]) {
        if line.trim().is_empty() {
            for uri in std::mem::take(&mut uris).into_iter().filter(|_| is_enabled) {
                server(origin, uri, found);
            }
            (is_enabled, field) = (true, String::new());
            continue;
        }
        if line.starts_with('#') {
            continue;
        }
        let value = if line.starts_with([' ', '\t']) {
            line
        } else {
            let (name, value) = line.split_once(':').unwrap_or((line, ""));
            field = name.trim().to_lowercase();
            value
        };
        match field.as_str() {
            "uris" => uris.extend(value.split_whitespace()),
            "enabled" => is_enabled = !["no", "false", "0", "off"].contains(&value.trim().to_lowercase().as_str()),
            _ => {}
        }
    }
}

fn server(origin: &str, uri: &str, found: &mut Found) {
    match uri.split_once(':').map(|(scheme, _)| scheme) {
        // Files of the host need no network.
        Some("file" | "cdrom" | "copy") => {}
        _ => found.url(origin, uri),
    }
}

/// `Acquire::http::Proxy "URL";`, also for one server
fn proxies(origin: &str, text: &str, found: &mut Found) {
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with("//") && !line.starts_with('#')) {
        let lower = line.to_lowercase();
        if !lower.contains("proxy") || lower.contains("proxy-auto") {
            continue;
        }
        let value = line.split_once('"').and_then(|(_, rest)| rest.split_once('"')).map(|(value, _)| value);
        if let Some(url) = value.filter(|value| value.contains("://")) {
            found.url(origin, url);
        }
    }
}
