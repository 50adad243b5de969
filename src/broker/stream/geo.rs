//! Places in LavinMQ's stream filters: a message's headers `x-geo-lat` and `x-geo-lon`, in degrees, against an area.

use amq_protocol::types::{AMQPValue, FieldTable};

use crate::model::arguments::{as_integer, lookup};

const EARTH_RADIUS_KM: f64 = 6371.0;
/// Corners a polygon may have: every message is compared with all of them.
const MAX_CORNERS: usize = 1024;

/// A part of the earth's surface, in degrees.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Area {
    Circle { lat: f64, lon: f64, radius_km: f64 },
    Box { lat: (f64, f64), lon: (f64, f64) },
    Polygon(Vec<(f64, f64)>),
}

/// Reads an area; the error is a reason for the client.
type Reader = fn(&FieldTable) -> Result<Area, String>;

/// Reads the areas of the filter `name`; `None` when that is no filter of places.
pub(super) fn reader(name: &str) -> Option<Reader> {
    match name {
        "geo-within-radius" => Some(circle),
        "geo-bbox" => Some(bounding_box),
        "geo-polygon" => Some(polygon),
        _ => None,
    }
}

impl Area {
    /// Whether the point lies within; never for one that is not on earth.
    pub fn contains(&self, lat: f64, lon: f64) -> bool {
        if check_point(lat, lon).is_err() {
            return false;
        }
        match self {
            Area::Circle { lat: centre_lat, lon: centre_lon, radius_km } => {
                distance_km((*centre_lat, *centre_lon), (lat, lon)) <= *radius_km
            }
            Area::Box { lat: lats, lon: lons } => (lats.0..=lats.1).contains(&lat) && (lons.0..=lons.1).contains(&lon),
            Area::Polygon(corners) => is_inside(corners, lat, lon),
        }
    }
}

/// Great-circle distance (haversine).
fn distance_km(from: (f64, f64), to: (f64, f64)) -> f64 {
    let (lat1, lat2) = (from.0.to_radians(), to.0.to_radians());
    let (half_lat, half_lon) = ((to.0 - from.0).to_radians() / 2.0, (to.1 - from.1).to_radians() / 2.0);
    let a = half_lat.sin().powi(2) + lat1.cos() * lat2.cos() * half_lon.sin().powi(2);
    2.0 * EARTH_RADIUS_KM * a.sqrt().atan2((1.0 - a).max(0.0).sqrt())
}

/// Counts the edges that a ray from the point crosses.
fn is_inside(corners: &[(f64, f64)], lat: f64, lon: f64) -> bool {
    let mut inside = false;
    let previous = corners.iter().cycle().skip(corners.len().saturating_sub(1));
    for (&(lat1, lon1), &(lat2, lon2)) in corners.iter().zip(previous) {
        if (lon1 > lon) != (lon2 > lon) && lat < (lat2 - lat1) * (lon - lon1) / (lon2 - lon1) + lat1 {
            inside = !inside;
        }
    }
    inside
}

fn check_point(lat: f64, lon: f64) -> Result<(), String> {
    if !(-90.0..=90.0).contains(&lat) {
        return Err("Latitude must be between -90 and 90".into());
    }
    if !(-180.0..=180.0).contains(&lon) {
        return Err("Longitude must be between -180 and 180".into());
    }
    Ok(())
}

fn number(value: &AMQPValue) -> Result<f64, String> {
    match value {
        AMQPValue::Float(number) => Ok(f64::from(*number)),
        AMQPValue::Double(number) => Ok(*number),
        other => as_integer(other).map(|number| number as f64).ok_or_else(|| "Expected numeric value".into()),
    }
}

fn field(table: &FieldTable, name: &str) -> Result<f64, String> {
    number(lookup(table, name).ok_or_else(|| format!("Missing hash key: \"{name}\""))?)
}

fn circle(table: &FieldTable) -> Result<Area, String> {
    let (lat, lon, radius_km) = (field(table, "lat")?, field(table, "lon")?, field(table, "radius_km")?);
    check_point(lat, lon)?;
    if radius_km.is_nan() || radius_km <= 0.0 {
        return Err("Radius must be positive".into());
    }
    Ok(Area::Circle { lat, lon, radius_km })
}

fn bounding_box(table: &FieldTable) -> Result<Area, String> {
    let (min_lat, min_lon) = (field(table, "min_lat")?, field(table, "min_lon")?);
    let (max_lat, max_lon) = (field(table, "max_lat")?, field(table, "max_lon")?);
    if min_lat > max_lat {
        return Err("min_lat must be <= max_lat".into());
    }
    if min_lon > max_lon {
        return Err("min_lon must be <= max_lon".into());
    }
    check_point(min_lat, min_lon)?;
    check_point(max_lat, max_lon)?;
    Ok(Area::Box { lat: (min_lat, max_lat), lon: (min_lon, max_lon) })
}

fn polygon(table: &FieldTable) -> Result<Area, String> {
    let points = match lookup(table, "points") {
        Some(AMQPValue::FieldArray(points)) => points.as_slice(),
        Some(_) => return Err("Points must be an array".into()),
        None => return Err("Missing required field: points".into()),
    };
    if points.len() < 3 {
        return Err(format!("Polygon must have at least 3 points, got {}", points.len()));
    }
    if points.len() > MAX_CORNERS {
        return Err(format!("Polygon must have at most {MAX_CORNERS} points, got {}", points.len()));
    }
    let corner = |(index, point): (usize, &AMQPValue)| {
        let AMQPValue::FieldArray(pair) = point else { return Err(format!("Point at index {index} must be an array")) };
        let [lat, lon] = pair.as_slice() else {
            return Err(format!("Point at index {index} must have exactly 2 elements [lat, lon]"));
        };
        let (lat, lon) = (number(lat)?, number(lon)?);
        check_point(lat, lon).map(|()| (lat, lon))
    };
    points.iter().enumerate().map(corner).collect::<Result<_, _>>().map(Area::Polygon)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_great_circles() {
        let (stockholm, gothenburg) = ((59.3293, 18.0686), (57.7089, 11.9746));
        let distance = distance_km(stockholm, gothenburg);
        assert!((390.0..405.0).contains(&distance), "{distance}");
        assert_eq!(distance_km(stockholm, stockholm), 0.0);
        assert!((distance_km((0.0, 0.0), (0.0, 180.0)) - EARTH_RADIUS_KM * std::f64::consts::PI).abs() < 1e-6);
    }

    #[test]
    fn a_polygon_may_have_a_dent() {
        let corners = vec![(0.0, 0.0), (10.0, 0.0), (10.0, 10.0), (5.0, 5.0), (0.0, 10.0)];
        let area = Area::Polygon(corners);
        for (lat, lon, inside) in [(2.0, 2.0, true), (5.0, 8.0, false), (9.0, 8.5, true), (11.0, 1.0, false)] {
            assert_eq!(area.contains(lat, lon), inside, "{lat} {lon}");
        }
        assert!(!Area::Box { lat: (-90.0, 90.0), lon: (-180.0, 180.0) }.contains(f64::NAN, 0.0));
    }

    #[test]
    fn areas_that_cannot_be_are_refused() {
        let pair =
            |lat: i32, lon: i32| AMQPValue::FieldArray(vec![AMQPValue::LongInt(lat), AMQPValue::LongInt(lon)].into());
        let points = |points: Vec<AMQPValue>| {
            let mut table = FieldTable::default();
            table.insert("points".into(), AMQPValue::FieldArray(points.into()));
            polygon(&table).unwrap_err()
        };
        assert_eq!(points(vec![pair(0, 0)]), "Polygon must have at least 3 points, got 1");
        assert_eq!(points(vec![pair(0, 0), pair(91, 0), pair(0, 0)]), "Latitude must be between -90 and 90");
        assert_eq!(points(vec![pair(0, 0), AMQPValue::Void, pair(0, 0)]), "Point at index 1 must be an array");
        let mut table = FieldTable::default();
        for (name, value) in [("lat", 1), ("lon", 1), ("radius_km", 0)] {
            table.insert(name.into(), AMQPValue::LongInt(value));
        }
        assert_eq!(circle(&table).unwrap_err(), "Radius must be positive");
    }
}
