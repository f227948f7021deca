//! The description of the API as the server uses it: the text that it serves, and which inputs each route accepts.
//!
//! It is made of the routes (`openapi.rs`) and passed down in `App`, so extractors and middleware read it without
//! knowing the routes.

use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

use axum::http::Method;
use serde_json::Value;

/// The inputs of a route that is not described: none.
static NO_INPUTS: LazyLock<RouteInputs> = LazyLock::new(RouteInputs::default);

/// What a request may carry besides its path parameters.
#[derive(Debug, Default)]
pub struct RouteInputs {
    /// The description has this method and route.
    pub described: bool,
    /// A JSON body.
    pub json: bool,
    /// The names of its query parameters.
    pub query: HashSet<String>,
}

impl RouteInputs {
    fn of(operation: &Value) -> Self {
        let parameters = operation["parameters"].as_array().into_iter().flatten();
        let query = parameters.filter(|one| one["in"] == "query").filter_map(|one| one["name"].as_str());
        Self {
            described: true,
            json: operation["requestBody"]["content"].get("application/json").is_some(),
            query: query.map(str::to_owned).collect(),
        }
    }
}

/// The OpenAPI text, and the inputs of each method and route.
#[derive(Debug)]
pub struct ApiDescription {
    text: String,
    inputs: HashMap<String, RouteInputs>,
}

impl ApiDescription {
    /// Reads the inputs of each route from the OpenAPI text.
    pub fn parse(text: String) -> Self {
        let api: Value = serde_json::from_str(&text).unwrap_or_default();
        let items = api["paths"].as_object().into_iter().flatten();
        let of = |(route, item): (&String, &Value)| {
            let operations = item.as_object().into_iter().flatten();
            operations.map(|(method, operation)| (key(method, route), RouteInputs::of(operation))).collect::<Vec<_>>()
        };
        let inputs = items.flat_map(of).collect();
        Self { text, inputs }
    }

    /// The OpenAPI document, as it is served.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The inputs of a method and route. A route that is not described has none.
    pub fn inputs(&self, method: &Method, route: &str) -> &RouteInputs {
        let method = if method == Method::HEAD { &Method::GET } else { method };
        self.inputs.get(&key(method.as_str(), route)).unwrap_or(&NO_INPUTS)
    }

    /// Whether any method of a route is described.
    pub fn has_route(&self, route: &str) -> bool {
        [Method::GET, Method::POST, Method::PUT, Method::DELETE]
            .iter()
            .any(|method| self.inputs(method, route).described)
    }
}

fn key(method: &str, route: &str) -> String {
    format!("{} {route}", method.to_ascii_uppercase())
}
