//! `If-Match` on a VM: a request for one VM does not change another VM that has taken its name. The entity tag of a VM is its id.
//!
//! Invariant: the handler uses the id that was compared, not the name.

use std::sync::Arc;

use axum::extract::{FromRequestParts as _, MatchedPath, RawPathParams, Request, State};
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;
use nido_api::error::{Code, Error, Result};
use nido_api::name::VmName;

use super::App;
use super::extract::MatchedVmId;
use super::response::Problem;

/// The routes that a condition is for.
const VM: &str = "/v1/vms/{name}";

/// Refuses a request whose `If-Match` does not name the VM's id.
pub async fn check_if_match(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> std::result::Result<Response, Problem> {
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let is_of_vm = route
        .as_deref()
        .is_some_and(|route| route.strip_prefix(VM).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')));
    // A method that the resource does not know is answered as such.
    let is_known = route.as_deref().is_some_and(|route| app.description.inputs(request.method(), route).described);
    if !is_of_vm || !is_known || !request.headers().contains_key(header::IF_MATCH) {
        return Ok(next.run(request).await);
    }
    let (mut parts, body) = request.into_parts();
    let wanted = tags(parts.headers.get_all(header::IF_MATCH).iter())?;
    let names = RawPathParams::from_request_parts(&mut parts, &()).await;
    let name = names.iter().flatten().find(|(key, _)| *key == "name").map(|(_, value)| value.parse::<VmName>());
    if let Some(Ok(name)) = name {
        let id = app.nido().await?.vm_id(&name)?;
        if !wanted.iter().any(|tag| tag == "*" || *tag == id) {
            let words = format!("If-Match: VM '{name}' has the id {id}, not the one in the request");
            return Err(Error::new(Code::VmReplaced, words)
                .hint("check the VM that has this name now, then repeat the request with its ETag")
                .into());
        }
        parts.extensions.insert(MatchedVmId(id.parse()?));
    }
    Ok(next.run(Request::from_parts(parts, body)).await)
}

/// The entity tags of a header. Weak ones never match.
fn tags<'a>(values: impl Iterator<Item = &'a HeaderValue>) -> Result<Vec<String>> {
    let wrong = || {
        Error::new(Code::RequestInvalid, "If-Match: entity tags are in double quotes").hint("the header ETag of a VM")
    };
    let (mut tags, mut is_empty) = (Vec::new(), true);
    for value in values {
        for tag in value.to_str().map_err(|_| wrong())?.split(',').map(str::trim).filter(|tag| !tag.is_empty()) {
            is_empty = false;
            let quoted = tag.strip_prefix('"').and_then(|tag| tag.strip_suffix('"'));
            match quoted {
                _ if tag == "*" => tags.push("*".to_owned()),
                _ if tag.starts_with("W/") => {}
                Some(id) => tags.push(id.to_owned()),
                None => return Err(wrong()),
            }
        }
    }
    if is_empty { Err(wrong()) } else { Ok(tags) }
}

/// Gives a response that is a VM its entity tag.
pub fn tag(response: &mut Response, id: &str) {
    if let Ok(tag) = HeaderValue::from_str(&format!("\"{id}\"")) {
        response.headers_mut().insert(header::ETAG, tag);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entity_tags_are_quoted_and_strong() {
        let of = |text: &'static str| tags([&HeaderValue::from_static(text)].into_iter());
        assert_eq!(of("\"a1\", W/\"b2\" ,*").unwrap(), ["a1", "*"]);
        assert_eq!(of("a1").unwrap_err().code(), Code::RequestInvalid);
    }
}
